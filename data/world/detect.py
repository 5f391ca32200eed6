"""What is to be seen in a clip: blobs of palette colours, tracks, and how the camera moves.

Mixing with grey leaves a colour's hue alone and scales its chroma, so chroma is coverage and partly
covered edge pixels still name the right colour. Only where two colours meet may a false hue arise:
one pixel wide, so a blob must somewhere be two pixels thick.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage

from longtake.data.world.render import coverage
from longtake.data.world.scene import COLOURS, PALETTE, SHAPES

MIN_COVERAGE = 0.45
MIN_AREA = 0.0106  # of the shorter side squared: a fifth of the smallest entity
_IN_FRAME = np.zeros((3, 3, 3), bool)
_IN_FRAME[1] = True


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
        return float(np.percentile(self.area[self.seen], 80)) if self.seen.any() else 0.0


@dataclass(frozen=True, slots=True)
class CameraMotion:
    """What the background did over the whole clip: shift (px) and zoom (log factor)."""

    shift_x: float
    shift_y: float
    log_zoom: float


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
        chroma = _chroma(frames.astype(np.float32))
        along = chroma @ _PALETTE_UNIT.T  # (T, H, W, 6)
        self.label = along.argmax(-1)
        strength = np.sqrt((chroma * chroma).sum(-1)) / _PALETTE_NORM[self.label]
        self.cover = np.minimum(strength, 1.0)  # (T, H, W)
        self.saturated = self.cover > MIN_COVERAGE

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
        labels, number = ndimage.label(mask, _IN_FRAME)  # pyright: ignore[reportGeneralTypeIssues]
        frames: list[list[Blob]] = [[] for _ in range(self.num_frames)]
        if not number:
            return frames
        thick = mask[:, :-1, :-1] & mask[:, 1:, :-1] & mask[:, :-1, 1:] & mask[:, 1:, 1:]
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

    def shape_of(self, track: Track, names: tuple[str, ...] = SHAPES) -> str:
        """The shape whose ideal picture at the track's place and area overlaps it best."""
        best = np.argsort(-track.area)[: max(1, min(7, int(track.seen.sum())))]
        index = COLOURS.index(track.colour)
        cover = np.where(self.label[best] == index, self.cover[best], 0.0)
        radius = np.sqrt(track.area[best] / np.pi)[:, None, None]
        dy = np.arange(self.height)[None, :, None] + 0.5 - track.y[best][:, None, None]
        dx = np.arange(self.width)[None, None, :] + 0.5 - track.x[best][:, None, None]
        near = np.maximum(abs(dx), abs(dy)) <= 1.7 * radius + 1
        errors = [(abs(coverage(name, dx, dy, radius) - cover) * near).sum() for name in names]
        return names[int(np.argmin(errors))]

    @cached_property
    def camera(self) -> CameraMotion:
        """Least-squares flow of the unsaturated pixels, one constant pan and zoom per clip."""
        clean = ndimage.binary_erosion(self.cover < 0.12, _IN_FRAME, border_value=1)
        step = max(1, self.side // 32)  # large frames are averaged down: it is the path that counts
        rows, cols = self.height // step, self.width // step

        def shrink(values: np.ndarray) -> np.ndarray:
            cut = values[:, : rows * step, : cols * step]
            return cut.reshape(-1, rows, step, cols, step).mean((2, 4), dtype=np.float32)

        grey = shrink(self.frames.mean(-1, dtype=np.float32))
        weight = (shrink(clean) == 1.0).astype(np.float32)
        motion = np.zeros(3)  # px, px, log factor, per frame
        for sigma in (2.0, 2.0, 2.0, 1.0, 1.0, 0.6):
            motion += _flow_step(grey, weight, motion, sigma)
        shift_x, shift_y, log_zoom = motion * (self.num_frames - 1)
        return CameraMotion(float(shift_x * step), float(shift_y * step), float(log_zoom))


def _flow_step(grey: np.ndarray, clean: np.ndarray, motion: np.ndarray, sigma: float) -> np.ndarray:
    """One Gauss-Newton step on I_t(p) = I_{t+1}(p + shift + zoom · (p − centre))."""
    height, width = grey.shape[1:]
    blur = (0.0, sigma, sigma)
    weight = ndimage.gaussian_filter(clean, blur)
    soft = ndimage.gaussian_filter(grey * clean, blur) / np.maximum(weight, 1e-3)
    y, x = np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2
    at_y = y * np.exp(motion[2]) + motion[1] + (height - 1) / 2
    at_x = x * np.exp(motion[2]) + motion[0] + (width - 1) / 2
    is_row = (at_y >= 0) & (at_y <= height - 1)
    inside = is_row[:, None] & (at_x >= 0) & (at_x <= width - 1)
    to_y, to_x = _linear(at_y), _linear(at_x).T
    ahead = to_y @ soft[1:] @ to_x  # (T - 1, H, W)
    keep = (clean[:-1] > 0.5) & (to_y @ clean[1:] @ to_x > 0.99) & inside
    slope_y, slope_x = np.gradient(ahead, axis=(1, 2))
    slope_zoom = slope_x * x + slope_y * y[:, None]
    rows = np.stack([slope_x, slope_y, slope_zoom], -1)[keep]  # (n, 3)
    wanted = (soft[:-1] - ahead)[keep]
    ridge = np.diag([1.0, 1.0, min(height, width) ** 2 / 12.0]) * 1e-3 * max(len(rows), 1)
    step = np.linalg.solve(rows.T @ rows + ridge, rows.T @ wanted)
    return np.clip(step, (-1.5, -1.5, -0.1), (1.5, 1.5, 0.1))


def _linear(at: np.ndarray) -> np.ndarray:
    """Weights (n, n) of linear interpolation at the indices `at` (n,), clamped to the ends."""
    at = np.clip(at, 0, len(at) - 1)
    return np.maximum(1 - abs(at[:, None] - np.arange(len(at))), 0.0)
