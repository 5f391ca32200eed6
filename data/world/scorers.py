"""Scores in [0, 1] of what a clip shows against what its caption asks for.

A scorer looks at the frames alone: where and how fast a generated entity moves is its own affair,
so long as what the caption asks for comes true. Each is valid only as its permanent test says:
truth near 1, planted faults near 0, shuffled captions at chance, H.264, noise and a frame of timing
without effect, from 16x16x5 up. At 16x16 few pixels tell shapes apart, so there a codec lowers
their ceiling first. Scorers of a single family live in its module.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from longtake.data.world.detect import Detection, Track
from longtake.data.world.ground import Ground
from longtake.data.world.scene import DIRECTIONS, SIZES

Scorer = Callable[..., float]
SCORERS: dict[str, Scorer] = {}
"""Every scorer by name; the parameters after the detection are those that `Ask.values` fill."""
SIZE_LIMIT = float(np.sqrt(SIZES["small"] * SIZES["large"]))
PACE_LIMIT = 0.25  # of the shorter side per clip, between slow and quick
SAME_AREA = 0.42  # log ratio; a bite takes up to 0.3 of it, a flicker of a third 0.6
MIN_MOVE = 0.05  # of the shorter side: what counts as having moved at all


def scorer(function: Scorer) -> Scorer:
    """Enter a function into SCORERS; ValueError for a name that is taken."""
    if function.__name__ in SCORERS:
        raise ValueError(f"scorer {function.__name__!r} is defined twice: rename one")
    SCORERS[function.__name__] = function
    return function


def score_frames(
    frames: np.ndarray | Detection, expect: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """Scores of frames uint8 (T, H, W, 3): name -> [0, 1] for every scorer with its parameters.

    What was found in them can be passed instead, to ask for more than one thing.
    ValueError if the frames are not uint8 RGB.
    """
    seen = frames if isinstance(frames, Detection) else Detection(frames)
    return {name: float(SCORERS[name](seen, **values)) for name, values in expect.items()}


def score_clip(frames: np.ndarray | Detection, truth: Mapping[str, Any]) -> dict[str, float]:
    """`score_frames` with what a truth record expects."""
    return score_frames(frames, truth["expect"])


def along(track: Track, word: str) -> np.ndarray:
    """Position along a direction, (T,) px."""
    ux, uy = DIRECTIONS[word]
    return ux * track.x + uy * track.y


def travel(track: Track) -> np.ndarray:
    """Displacement (x, y) in px over the clip, from a straight line fitted where it is seen."""
    at = np.nonzero(track.seen)[0]
    if len(at) < 2:
        return np.zeros(2)
    since = at - at.mean()
    slope = since @ np.stack([track.x[at], track.y[at]], 1) / (since @ since)
    return slope * (len(track.x) - 1)


def whole_subject(seen: Detection) -> Track | None:
    """The largest entity if it is whole in every frame; None in clips of less than four frames."""
    track = seen.main
    if track is None or seen.num_frames < 4 or not (track.blobs == 1).all():
        return None
    return track if track.area.min() > 0.75 * track.full_area else None


@scorer
def colour(seen: Detection, colours: list[str]) -> float:
    """Exactly the asked colours are there."""
    return set(seen.tracks) == set(colours)


@scorer
def shape(seen: Detection, shape: str, colour: str | None = None) -> float:
    """The largest entity (or that of a colour) has the asked shape."""
    track = seen.main if colour is None else seen.tracks.get(colour)
    return track is not None and seen.shape_of(track) == shape


@scorer
def looks(seen: Detection, looks: Sequence[Mapping[str, Any]]) -> float:
    """Every named thing is there, of the asked shape whenever it is whole, and of the asked size.

    A look has the thing's `shape`, its `colours` (several where it turns), and perhaps its `size`,
    or how that `varies`.
    """
    for look in looks:
        tracks = [seen.tracks[name] for name in look["colours"] if name in seen.tracks]
        if not tracks or any(
            seen.shapes_of(track, varies="varies" in look) != {look["shape"]} for track in tracks
        ):
            return 0.0
        if "size" in look and any(_size_word(seen, track) != look["size"] for track in tracks):
            return 0.0
    return 1.0


def _size_word(seen: Detection, track: Track) -> str:
    radius = np.sqrt(track.full_area / np.pi) / seen.side
    return "large" if radius > SIZE_LIMIT else "small"


@scorer
def size(seen: Detection, size: str) -> float:
    """The largest entity's radius is on the asked side of the limit between small and large."""
    return seen.main is not None and _size_word(seen, seen.main) == size


@scorer
def count(seen: Detection, count: int | str) -> float:
    """The median number of entities is the asked one."""
    numbers = np.sum([t.blobs for t in seen.tracks.values()], axis=0)
    return bool(seen.tracks) and np.median(numbers) == int(count)


@scorer
def count_constancy(seen: Detection) -> float:
    """Every colour has the same number of entities in every frame, and there is at least one."""
    tracks = seen.tracks.values()
    return bool(tracks) and all((t.blobs == t.blobs[0]).all() for t in tracks)


@scorer
def direction(seen: Detection, word: str, colour: str | None = None) -> float:
    """The largest entity (or that of a colour) moves, and mostly in the asked direction.

    Under the word `still` it keeps its place in every frame.
    """
    track = seen.main if colour is None else seen.tracks.get(colour)
    if track is None:
        return 0.0
    if word == "still":
        return max(np.ptp(track.x), np.ptp(track.y)) < MIN_MOVE * seen.side + 0.5
    way = travel(track)
    axis = int(np.argmax(abs(way)))
    if abs(way[axis]) < MIN_MOVE * seen.side or abs(way[axis]) < 1.5 * abs(way[1 - axis]):
        return 0.0
    return way[axis] * DIRECTIONS[word][axis] > 0


@scorer
def pace(seen: Detection, pace: str) -> float:
    """The largest entity travels less or more than the limit between slow and quick."""
    if seen.main is None:
        return 0.0
    way = float(np.hypot(*travel(seen.main))) / seen.side
    return way > MIN_MOVE and (way > PACE_LIMIT) == (pace == "quickly")


@scorer
def consistency(seen: Detection, camera: str = "static") -> float:
    """Every entity keeps its shape and its size, and there is at least one.

    Under a camera that zooms its size may grow or shrink, steadily.
    """
    tracks, is_zoomed = seen.tracks.values(), camera.startswith("zoom")
    return bool(tracks) and all(
        len(seen.shapes_of(track, varies=is_zoomed)) == 1 and keeps_size(track, is_zoomed=is_zoomed)
        for track in tracks
    )


def keeps_size(track: Track, *, is_zoomed: bool = False) -> bool:
    """Whether a track has one area wherever it is seen, apart from a steady zoom."""
    at = np.nonzero(track.seen)[0]
    area = np.log(track.area[at])
    if is_zoomed and len(at) > 2:
        area -= np.polyval(np.polyfit(at, area, 1), at)
    return np.ptp(area) < SAME_AREA


@scorer
def static_camera(seen: Detection, stance: str, rows: int = 1, columns: int = 1) -> float:
    """The ground, that of every panel, stays as it is at first: no camera moves or cuts."""
    height, width = seen.height // rows, seen.width // columns
    for row, column in np.ndindex(rows, columns):
        part = np.s_[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
        if not Ground(seen.frames[part], seen.cover[part]).is_static:
            return 0.0
    return 1.0
