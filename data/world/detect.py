"""What is to be seen in a clip: blobs of palette colours, tracks, and how the camera moves.

Mixing with grey leaves a colour's hue alone and scales its chroma, so chroma is coverage and partly
covered edge pixels still name the right colour. Only where two colours meet may a false hue arise:
one pixel wide, so a blob must somewhere be two pixels thick.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy import ndimage

from longtake.data.world.flow import CameraMotion, background_motion
from longtake.data.world.ground import Ground
from longtake.data.world.render import coverage
from longtake.data.world.scene import COLOURS, PALETTE, shapes_at

MIN_COVERAGE = 0.45
SOFT = 0.9  # of the palette's chroma: below it a colour counts as painted softly
WHOLE = 0.8  # of its greatest area: less of a thing may be hidden, merged or between two colours
WINDOW = 2  # frames that together tell a shape
CLEARLY = 0.75  # of a shape's misfit: the most that one which fits clearly better has
MIN_AREA = 0.0106  # of the shorter side squared: a fifth of the smallest entity
IN_FRAME = np.zeros((3, 3, 3), bool)
IN_FRAME[1] = True
"""Of what is connected to what: neighbours, also across a corner, in the same frame."""


def _chroma(rgb: np.ndarray) -> np.ndarray:
    """RGB (..., 3) to the two chroma coordinates (..., 2); grey is the origin, hue the angle."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return np.stack([r - 0.5 * (g + b), 0.8660254 * (g - b)], axis=-1)


_PALETTE_CHROMA = _chroma(np.array([PALETTE[c] for c in COLOURS], np.float32))  # (6, 2)
_PALETTE_NORM = np.linalg.norm(_PALETTE_CHROMA, axis=1)
_PALETTE_UNIT = _PALETTE_CHROMA / _PALETTE_NORM[:, None]


@dataclass(frozen=True, slots=True)
class Blob:
    """A connected patch of one colour in one frame: soft centroid (px) and soft area (px²)."""

    x: float
    y: float
    area: float


@dataclass(frozen=True, slots=True)
class Track:
    """The largest blob of a colour at each of T frames (NaN where absent), and their number."""

    colour: str
    x: np.ndarray  # (T,)
    y: np.ndarray
    area: np.ndarray  # 0 where absent
    blobs: np.ndarray  # (T,) int

    @property
    def seen(self) -> np.ndarray:
        return self.blobs > 0

    @property
    def full_area(self) -> float:
        """Area when nothing hides it: the 80th percentile over the frames where it is seen."""
        areas = np.sort(self.area[self.seen])
        if not len(areas):
            return 0.0
        at = 0.8 * (len(areas) - 1)  # as np.percentile, in a twentieth of its time
        low, high = areas[int(at)], areas[int(np.ceil(at))]
        return float(low + (high - low) * (at % 1))


class Detection:
    """Everything the scorers ask about a clip, frames uint8 (T, H, W, 3); found once, on demand."""

    def __init__(self, frames: np.ndarray) -> None:
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(
                f"frames {frames.dtype} {frames.shape} cannot be scored: pass uint8 (T, H, W, 3)"
            )
        self.frames = frames
        self.num_frames, self.height, self.width = frames.shape[:3]
        self.side = min(self.height, self.width)
        # one plane after the other: NumPy is slow at a short last axis
        chroma = np.ascontiguousarray(_chroma(frames.astype(np.float32)).reshape(-1, 2).T)
        self.chroma = chroma.reshape(2, *frames.shape[:3])  # grey is the origin, hue the angle
        along = _PALETTE_UNIT @ chroma  # (6, T · H · W)
        label, best = np.zeros(along.shape[1], np.int64), along[0]
        for index in range(1, len(COLOURS)):
            label[along[index] > best] = index
            best = np.maximum(best, along[index])
        self.label = label.reshape(frames.shape[:3])
        strength = np.sqrt(chroma[0] ** 2 + chroma[1] ** 2).reshape(self.label.shape)
        strength /= _PALETTE_NORM[self.label]
        self._brighten(strength)
        self.cover = np.minimum(strength, 1.0)  # (T, H, W)
        self.saturated = self.cover > MIN_COVERAGE

    def _brighten(self, strength: np.ndarray) -> None:
        """Scale each colour's chroma (T, H, W) in place so that its full coverage is 1.

        A generator may paint softer colours than the palette's; their shapes count all the same.
        """
        for index in np.unique(self.label[strength > MIN_COVERAGE]):
            mine = self.label == index
            full = np.percentile(strength[mine & (strength > MIN_COVERAGE)], 90)
            if full < SOFT:
                strength[mine] /= full

    @cached_property
    def tracks(self) -> dict[str, Track]:
        """By colour, the colours seen in at least a third of the frames, largest first."""
        found = []
        for index, colour in enumerate(COLOURS):
            track = self._track(colour, index)
            if track.seen.any() and 3 * track.seen.sum() >= self.num_frames:
                found.append(track)
        return {t.colour: t for t in sorted(found, key=lambda t: -t.area.sum())}

    def _track(self, colour: str, index: int) -> Track:
        shape = (self.num_frames,)
        x, y, area = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape)
        counts = np.zeros(shape, int)
        for t, blobs in enumerate(self._blobs(index)):
            if blobs:
                largest = max(blobs, key=lambda b: b.area)
                x[t], y[t], area[t] = largest.x, largest.y, largest.area
                counts[t] = len(blobs)
        return Track(colour, x, y, area, counts)

    def _blobs(self, colour: int) -> list[list[Blob]]:
        """Per frame the blobs of a colour, without debris and one-pixel seams.

        Faint pixels at an edge count for place and area, not for what is connected to what.
        """
        mask = self.saturated & (self.label == colour)
        frames: list[list[Blob]] = [[] for _ in range(self.num_frames)]
        thick = mask[:, :-1, :-1] & mask[:, 1:, :-1] & mask[:, :-1, 1:] & mask[:, 1:, 1:]
        if not thick.any():
            return frames
        labels, number = ndimage.label(mask, IN_FRAME)  # pyright: ignore[reportGeneralTypeIssues]
        has_core = np.zeros(number + 1, bool)
        has_core[labels[:, :-1, :-1][thick]] = True
        edge = ndimage.maximum_filter(labels, size=(1, 3, 3)) * (self.cover > 0.1)
        labels = np.where(labels > 0, labels, edge * (self.label == colour))
        at = np.nonzero(labels)
        which, weight = labels[at], self.cover[at]
        area = np.bincount(which, weight, number + 1)
        x = np.bincount(which, weight * (at[2] + 0.5), number + 1)
        y = np.bincount(which, weight * (at[1] + 0.5), number + 1)
        frame = np.zeros(number + 1, int)
        frame[which] = at[0]
        keep = has_core & (area >= MIN_AREA * self.side**2)
        whole = area[keep].max(initial=0.0)
        for i in np.nonzero(keep)[0]:
            blob = Blob(x[i] / area[i], y[i] / area[i], float(area[i]))
            rest = [b for b in frames[frame[i]] if b.area + blob.area <= 1.1 * whole]
            twin = next((b for b in rest if self._is_bridged(frame[i], b, blob)), None)
            if twin is None:
                frames[frame[i]].append(blob)
            elif blob.area > twin.area:
                frames[frame[i]][frames[frame[i]].index(twin)] = blob
        return frames

    def _is_bridged(self, frame: int, one: Blob, two: Blob) -> bool:
        """Whether something of another colour lies between two blobs: it may cut one in two."""
        steps = np.linspace(0.0, 1.0, 2 * self.side)
        cols = np.clip((one.x + (two.x - one.x) * steps).astype(int), 0, self.width - 1)
        rows = np.clip((one.y + (two.y - one.y) * steps).astype(int), 0, self.height - 1)
        return bool((self.cover[frame, rows, cols] > 0.3).all())

    @property
    def main(self) -> Track | None:
        """The largest track: the subject where only one is asked for."""
        return next(iter(self.tracks.values()), None)

    def shapes_of(self, track: Track, *, varies: bool = False) -> set[str]:
        """The shapes that a track has in frames (some on end) in which it is whole: one blob, if it
        ever is, and about as large as ever, unless it `varies`.

        Some frames have another shape than most where that fits them clearly better.
        """
        is_one = track.blobs == 1
        area = track.area * is_one if is_one.any() else track.area
        at = np.nonzero(area > (0.0 if varies else WHOLE) * area.max())[0]
        names, size = shapes_at(self.side), min(WINDOW, len(at))
        errors = self.misfit(track, names, at)
        most = int(errors.sum(1).argmin())
        errors = errors.cumsum(1)  # (K, n)
        errors[:, size:] -= errors[:, :-size].copy()
        errors = errors[:, size - 1 :]
        is_other = errors.min(0) < CLEARLY * errors[most]
        return {names[most], *(names[best] for best in errors.argmin(0)[is_other])}

    def shape_of(self, track: Track) -> str:
        """The shape whose ideal picture at the track's place and area overlaps it best."""
        best = np.argsort(-track.area)[: max(1, min(7, int(track.seen.sum())))]
        names = shapes_at(self.side)
        return names[int(np.argmin(self.misfit(track, names, best).sum(1)))]

    def misfit(self, track: Track, names: Sequence[str], at: np.ndarray) -> np.ndarray:
        """Pixels (px²) by which each of K ideal shapes of a track's place and area differs from
        what is seen of it in the frames `at` (n,), (K, n)."""
        cover = np.where(self.label[at] == COLOURS.index(track.colour), self.cover[at], 0.0)
        radius = np.sqrt(track.area[at] / np.pi)[:, None, None]
        dy = np.arange(self.height)[None, :, None] + 0.5 - track.y[at][:, None, None]
        dx = np.arange(self.width)[None, None, :] + 0.5 - track.x[at][:, None, None]
        near = np.maximum(abs(dx), abs(dy)) <= 1.7 * radius + 1
        errors = [abs(coverage(name, dx, dy, radius) - cover) * near for name in names]
        return np.array([error.sum((1, 2)) for error in errors])

    def turning(self, start: str, end: str) -> np.ndarray | None:
        """How far a thing that rests has turned from one colour to another, (T,) from 0 to 1.

        None unless the one colour at first and the other at last cover the same place.
        """
        faint = self.cover > 0.3
        first = faint[0] & (self.label[0] == COLOURS.index(start))
        last = faint[-1] & (self.label[-1] == COLOURS.index(end))
        both = first & last
        if both.sum() < max(0.6 * max(first.sum(), last.sum()), MIN_AREA * self.side**2 / 2):
            return None
        cover = np.minimum(self.cover[0], self.cover[-1]) * both
        rgb = self.frames[:, cover > 0.8 * cover.max()].mean(1, dtype=np.float32)  # (T, 3)
        way = rgb[-1] - rgb[0]
        return (rgb - rgb[0]) @ way / (way @ way)

    @cached_property
    def ground(self) -> Ground:
        """What neither coloured nor dark things hide."""
        return Ground(self.frames, self.cover)

    @cached_property
    def camera(self) -> CameraMotion:
        """How the background moves; large frames are averaged down: it is the path that counts."""
        step = max(1, self.side // 32)
        rows, cols = self.height // step, self.width // step

        def shrink(values: np.ndarray) -> np.ndarray:
            cut = values[:, : rows * step, : cols * step].astype(np.float32)
            return cut.reshape(-1, rows, step, cols, step).mean((2, 4)) if step > 1 else cut

        coloured = ndimage.binary_dilation(shrink(self.cover) > 0.2, np.ones((1, 3, 3)))
        clean = np.logical_not(coloured)
        grey = shrink(self.frames @ np.full(3, 1 / 3, np.float32))
        motion = background_motion(grey, clean.astype(np.float32))
        return replace(motion, x=motion.x * step, y=motion.y * step)
