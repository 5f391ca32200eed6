"""Scores in [0, 1] of what a clip shows against what its truth record expects of it.

A scorer looks at the frames alone: where and how fast a generated entity moves is its own affair,
so long as what the caption asks for comes true. Each is valid only as its permanent test says:
truth near 1, planted faults near 0, shuffled captions at chance, H.264 without effect, from
16x16x5 up. At 16x16 few pixels tell shapes apart, so there a codec lowers their ceiling first.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from longtake.data.world.detect import Detection, Track
from longtake.data.world.families import FAMILIES
from longtake.data.world.scene import BAR_GREY, DIRECTIONS, SIZES

Scorer = Callable[..., float]
SIZE_LIMIT = float(np.sqrt(SIZES["small"] * SIZES["large"]))
MIN_MOVE = 0.05  # of the shorter side: what counts as having moved at all
DARK = (BAR_GREY[0] + 140) / 2  # between an occluder and the darkest background


def score_clip(
    frames: np.ndarray, truth: Mapping[str, Any], caption_kind: str | None = None
) -> dict[str, float]:
    """The scores a truth record expects of frames uint8 (T, H, W, 3).

    With `caption_kind` only those that captions of this kind determine. ValueError if the frames
    are not uint8 RGB.
    """
    seen = Detection(frames)
    names = truth["expect"] if caption_kind is None else truth["asked"][caption_kind]
    return {name: float(SCORERS[name](seen, **truth["expect"][name])) for name in names}


def chance_of(family: str, score: str) -> float:
    """What a score is worth in a family for a generator that does not read its prompt."""
    return FAMILIES[family].chance[score]


def _highest(kind: str) -> dict[str, float]:
    levels: dict[str, float] = {}
    for family in FAMILIES.values():
        for name, level in getattr(family, kind).items():
            levels[name] = max(level, levels.get(name, 0.0))
    return levels


CHANCE: dict[str, float] = _highest("chance")
"""By score, captions shuffled within the family: the highest of the families that define it."""
BLIND: dict[str, float] = _highest("blind")
"""By score, all drawn as asked except the one attribute: the level to beat for that attribute."""


def wilson(mean: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion from n trials (Wilson 1927), 95 % by default."""
    if n < 1:
        raise ValueError(f"n={n} must be at least 1: an interval needs a trial")
    middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def _along(track: Track, word: str) -> np.ndarray:
    """Position along a direction, (T,) px."""
    ux, uy = DIRECTIONS[word]
    return ux * track.x + uy * track.y


def _travel(track: Track) -> np.ndarray:
    """Displacement (x, y) in px over the clip, from a straight line fitted where it is seen."""
    at = np.nonzero(track.seen)[0]
    if len(at) < 2:
        return np.zeros(2)
    slope = np.polyfit(at, np.stack([track.x[at], track.y[at]], 1), 1)[0]
    return slope * (len(track.x) - 1)


def colour(seen: Detection, colours: list[str]) -> float:
    """Exactly the asked colours are there."""
    return set(seen.tracks) == set(colours)


def shape(seen: Detection, colour: str, shape: str) -> float:
    """The subject (the entity of the asked colour, else the largest) has the asked shape."""
    subject = seen.tracks.get(colour, seen.main)
    return subject is not None and seen.shape_of(subject) == shape


def size(seen: Detection, size: str) -> float:
    """The largest entity's radius is on the asked side of the limit between small and large."""
    if seen.main is None:
        return 0.0
    radius = np.sqrt(seen.main.full_area / np.pi) / seen.side
    return (radius > SIZE_LIMIT) == (size == "large")


def count(seen: Detection, count: int) -> float:
    """The median number of entities is the asked one."""
    numbers = np.sum([t.blobs for t in seen.tracks.values()], axis=0)
    return bool(seen.tracks) and np.median(numbers) == count


def count_constancy(seen: Detection) -> float:
    """Every colour has the same number of entities in every frame, and there is at least one."""
    tracks = seen.tracks.values()
    return bool(tracks) and all((t.blobs == t.blobs[0]).all() for t in tracks)


def direction(seen: Detection, word: str) -> float:
    """The largest entity moves, and mostly in the asked direction."""
    if seen.main is None:
        return 0.0
    travel = _travel(seen.main)
    axis = int(np.argmax(abs(travel)))
    if abs(travel[axis]) < MIN_MOVE * seen.side or abs(travel[axis]) < 1.5 * abs(travel[1 - axis]):
        return 0.0
    return travel[axis] * DIRECTIONS[word][axis] > 0


def left_right(seen: Detection, left: str, right: str) -> float:
    """Both colours are there, and the one stays left of the other in nine frames of ten."""
    one, two = seen.tracks.get(left), seen.tracks.get(right)
    if one is None or two is None:
        return 0.0
    with np.errstate(invalid="ignore"):
        return (two.x - one.x > MIN_MOVE * seen.side).mean() >= 0.9


def permanence(seen: Detection, word: str) -> float:
    """One entity goes in the asked direction, vanishes only behind something dark, and comes out on
    its other side with its colour, on its way as if it had never been hidden."""
    track = seen.main
    if track is None or len(seen.tracks) > 1 or (track.blobs > 1).any():
        return 0.0
    shown = track.area > 0.3 * track.full_area
    edges = np.nonzero(np.diff(shown.astype(int)))[0]
    if not (shown[0] and shown[-1] and len(edges) == 2):
        return 0.0  # never hidden, hidden more than once, or never out again
    before, after = int(edges[0]), int(edges[1]) + 1
    if not _is_dark_between(seen, track, before, after):
        return 0.0
    along = _along(track, word)
    whole = np.nonzero(track.area > 0.8 * track.full_area)[0]
    first, last = whole[whole <= before], whole[whole >= after]
    if not len(first) or not len(last):
        return 0.0
    speed = (along[last[-1]] - along[first[0]]) / (last[-1] - first[0])
    if speed * (seen.num_frames - 1) < 4 * MIN_MOVE * seen.side:
        return 0.0
    expected = along[first[0]] + speed * (whole - first[0])
    return bool((abs(along[whole] - expected) < 0.12 * seen.side).all())


def _is_dark_between(seen: Detection, track: Track, before: int, after: int) -> bool:
    """Whether the middle of where a track was lost and found again is covered by an occluder."""
    col = int((track.x[before] + track.x[after]) / 2)
    row = int((track.y[before] + track.y[after]) / 2)
    patch = seen.frames[before + 1 : after, max(row - 1, 0) : row + 2, max(col - 1, 0) : col + 2]
    return bool(patch.mean() < DARK)


def causal(seen: Detection, hitter: str, target: str, word: str) -> float:
    """The hitter comes up to the target, which is still until they touch (± 1 frame); then the
    target moves off in the asked direction and the hitter stops."""
    one, two = seen.tracks.get(hitter), seen.tracks.get(target)
    if one is None or two is None or not (one.seen.all() and two.seen.all()):
        return 0.0
    unit, steps = seen.side, seen.num_frames - 1
    a, b = _along(one, word), _along(two, word)
    reach = 0.94 * (np.sqrt(one.full_area / np.pi) + np.sqrt(two.full_area / np.pi))
    gap = b - a - reach
    across = np.hypot(two.x - one.x, two.y - one.y)
    near = np.nonzero(gap <= gap.min() + 0.03 * unit)[0]
    start, end = int(near[0]), int(near[-1])  # of the contact, as sharply as pixels can tell
    pace = (a[start] - a[0]) / max(start, 1)
    if pace <= 0 or end - start > 2 + 2 * 0.03 * unit / pace:
        return 0.0  # it did not come, or they go on together
    came, went = a[end] - a[0], b[-1] - b[start]
    if not (-0.12 * unit < gap.min() < 0.09 * unit and across[start] < reach + 0.12 * unit):
        return 0.0  # they do not touch, or they run through each other
    if came < 0.07 * unit or went < 0.07 * unit:
        return 0.0  # no cause, or no effect
    shift = np.hypot(two.x - two.x[0], two.y - two.y[0])
    if (shift[: max(start, 1)] > max(0.02 * unit, 0.15 * (b[-1] - b[0]))).any():
        return 0.0  # an effect before its cause
    moved = np.nonzero(b - b[0] > 0.05 * unit)[0]
    speed = went / max(steps - start, 1)  # at least; px/frame
    if moved[0] > end + 2 + 0.05 * unit / speed:
        return 0.0  # an effect long after its cause
    after = a[min(end + 1, steps) :]
    return bool((abs(after - after[0]) < 0.06 * unit).all())


def camera_word(seen: Detection, word: str) -> float:
    """The background moves as the asked camera would make it: pan left shifts the picture right."""
    return camera_path_word(seen) == word


def camera_path_word(seen: Detection) -> str:
    """The word for the camera's path: `static`, `zoom in`, `pan left`, `follow up`, ..."""
    if seen.num_frames < 2:
        return "static"
    motion = seen.camera
    if abs(motion.log_zoom) > 0.15:
        return "zoom in" if motion.log_zoom > 0 else "zoom out"
    shift = np.array([motion.shift_x, motion.shift_y])
    axis = int(np.argmax(abs(shift)))
    if abs(shift[axis]) < 0.1 * (seen.width, seen.height)[axis]:
        return "static"
    heading = (("right", "left"), ("down", "up"))[axis][int(shift[axis] > 0)]
    subject = seen.main
    if subject is not None and abs(_travel(subject)[axis]) < 0.4 * abs(shift[axis]):
        return f"follow {heading}"
    return f"{('pan', 'tilt')[axis]} {heading}"


SCORERS: dict[str, Scorer] = {
    scorer.__name__: scorer
    for scorer in (
        colour,
        shape,
        size,
        count,
        count_constancy,
        direction,
        left_right,
        permanence,
        causal,
        camera_word,
    )
}
