"""The ground: what neither coloured nor dark things hide, and whether two frames show the same."""

from functools import cached_property

import numpy as np
from scipy import ndimage

COLOURED = (
    0.4  # of full chroma: noise has less; edges are softer, so what is next to it is hidden, too
)
DARK = 85  # of 255, in the brightest channel: no ground, but an occluder, a wall or a mark
GAIN = (0.8, 1.25)  # of contrast between two frames in other light
LIGHT = 0.12  # by which the mean may differ: flicker is no other place
OTHER = 0.3, 0.2  # of the texture's variance that light does not explain, in frames and in means
NOISE = 72.0, 48.0  # grey levels² over the pixels of a block: what noise of σ = 8 may add
MIN_BLOCKS = 4
GROUPS = 4  # of frames, whose means are compared


class Ground:
    """Grey means of square blocks of frames uint8 (T, H, W, 3) with `cover` (T, H, W) of colour."""

    def __init__(self, frames: np.ndarray, cover: np.ndarray) -> None:
        self.block = max(2, min(frames.shape[1:3]) // 8)
        self._frames, self._cover = frames, cover

    def _pooled(self, values: np.ndarray) -> np.ndarray:
        """Means (T, h, w) over blocks; what is left of the last rows and columns does not count."""
        height, width = (size // self.block for size in values.shape[1:])
        cut = values[:, : height * self.block, : width * self.block]
        return cut.reshape(-1, height, self.block, width, self.block).mean((2, 4), np.float32)

    @cached_property
    def grey(self) -> np.ndarray:
        """Grey levels (T, h·w)."""
        return self._pooled(self._frames.mean(-1, dtype=np.float32)).reshape(len(self._frames), -1)

    @cached_property
    def clean(self) -> np.ndarray:
        """Where no part of a block is hidden, (T, h·w) bool."""
        hidden = (self._cover > COLOURED) | (self._frames.max(-1) < DARK)
        hidden = ndimage.maximum_filter(hidden, size=(1, 3, 3))
        return (self._pooled(hidden) == 0).reshape(len(self._frames), -1)

    def changes(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Whether frames `after` (n,) show another ground than frames `before` (n,)."""
        return _differs(
            (self.grey[before], self.grey[after]),
            self.clean[before] & self.clean[after],
            OTHER[0],
            NOISE[0] / self.block**2,
        )

    @property
    def is_static(self) -> bool:
        """Whether all frames show the ground of the first; means over some see through noise."""
        times = np.arange(len(self.grey))
        if self.changes(np.zeros_like(times), times).any():
            return False
        groups = np.array_split(times, min(GROUPS, len(times)))
        number = np.array([self.clean[at].sum(0) for at in groups])  # (groups, h·w)
        total = np.array([(self.grey[at] * self.clean[at]).sum(0) for at in groups])
        grey, size = total / np.maximum(number, 1), len(times) / len(groups)
        both = (number > 0.5 * size) & (number[0] > 0.5 * size)
        noise = NOISE[1] / self.block**2 / size
        return not _differs((grey[:1], grey), both, OTHER[1], noise).any()

    @cached_property
    def cuts(self) -> list[int]:
        """First frames of new shots."""
        times = np.arange(len(self._frames))
        return (np.nonzero(self.changes(times[:-1], times[1:]))[0] + 1).tolist()


def _differs(
    grey: tuple[np.ndarray, np.ndarray], mask: np.ndarray, other: float, noise: float
) -> np.ndarray:
    """Whether the second of two pictures (n, h·w) is another than the first, seen at `mask`.

    It is fitted by a multiple of the first plus a constant, as far as light may change.
    """
    number = np.maximum(mask.sum(1), 1)
    old_mean, new_mean = ((g * mask).sum(1) / number for g in grey)
    old, new = (grey[0] - old_mean[:, None]) * mask, (grey[1] - new_mean[:, None]) * mask
    old_var, new_var = (old * old).sum(1) / number, (new * new).sum(1) / number
    gain = np.clip((old * new).sum(1) / number / np.maximum(old_var, 1e-6), *GAIN)
    rest = ((new - gain[:, None] * old) ** 2).sum(1) / number
    is_other = rest > other * np.minimum(old_var, new_var) + noise
    is_other |= abs(new_mean - old_mean) > LIGHT * old_mean
    return is_other & (mask.sum(1) >= MIN_BLOCKS)
