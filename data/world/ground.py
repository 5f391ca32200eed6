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
OTHER = 0.3  # of the texture's variance that light does not explain: another place
MIXED = 0.1  # of the texture's variance that a mix of two frames may leave unexplained
MOVED = 0.03  # of it by which groups of frames may differ
NOISE = 8**2 / 3  # variance of a grey pixel, levels²: what noise of σ = 8 in each channel adds
SURE = 4.0  # standard deviations that chance must not reach
MIN_BLOCKS = 4
GROUPS = 4  # of frames, whose means are compared
ROUNDS = 4  # of a fit of pictures and levels in turns, which converges fast


class Ground:
    """Grey means of square blocks of frames uint8 (T, H, W, 3) with `cover` (T, H, W) of colour."""

    def __init__(self, frames: np.ndarray, cover: np.ndarray) -> None:
        self.block = max(2, min(frames.shape[1:3]) // 8)
        self._frames, self._cover = frames, cover

    def _pooled(self, values: np.ndarray) -> np.ndarray:
        """Sums (T, h·w) over blocks; what is left of the last rows and columns does not count."""
        height, width = (size // self.block for size in values.shape[1:])
        cut = values[:, : height * self.block, : width * self.block]
        blocks = cut.reshape(-1, height, self.block, width, self.block)
        return blocks.sum((2, 4), dtype=np.float32).reshape(len(values), -1)

    @cached_property
    def _clean(self) -> np.ndarray:
        """Pixels (T, H, W) that nothing hides."""
        hidden = (self._cover > COLOURED) | (self._frames.max(-1) < DARK)
        return ~ndimage.maximum_filter(hidden, size=(1, 3, 3))

    @cached_property
    def number(self) -> np.ndarray:
        """Clean pixels of every block (T, h·w), 0 where they are less than half."""
        number = self._pooled(self._clean)
        return number * (2 * number >= self.block**2)

    @cached_property
    def grey(self) -> np.ndarray:
        """Grey levels (T, h·w) of the clean pixels."""
        grey = self._frames.mean(-1, dtype=np.float32)
        return self._pooled(grey * self._clean) / np.maximum(self.number, 1)

    def changes(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Whether frames `after` (n,) show another ground than frames `before` (n,).

        They are fitted by a multiple of the other plus a constant, as far as light may change.
        """
        numbers = self.number[before], self.number[after]
        # weight of a difference of two means, so that weight x its variance is a pixel's
        weight = numbers[0] * numbers[1] / np.maximum(numbers[0] + numbers[1], 1)
        old_level, old, old_var = _spread(self.grey[before], weight)
        new_level, new, new_var = _spread(self.grey[after], weight)
        total = np.maximum(weight.sum(1), 1e-6)
        gain = np.clip((old * new * weight).sum(1) / total / np.maximum(old_var, 1e-6), *GAIN)
        rest = ((new - gain[:, None] * old) ** 2 * weight).sum(1)
        blocks = (weight > 0).sum(1)
        is_other = rest > OTHER * np.minimum(old_var, new_var) * total + _noise(blocks, NOISE)
        is_other |= abs(new_level - old_level) > LIGHT * old_level
        return is_other & (blocks >= MIN_BLOCKS)

    @property
    def is_static(self) -> bool:
        """Whether all frames show the ground of the first, and do not drift away from it."""
        times = np.arange(len(self.grey))
        return not (self.changes(np.zeros_like(times), times).any() or self._drifts)

    @property
    def _drifts(self) -> bool:
        """Whether means over groups of frames differ by more than what differs within them.

        Analysis of variance of what one picture, lit in each frame as it may be, does not explain.
        """
        number, level = self.number, np.zeros((len(self.grey), 1), np.float32)
        seen = np.maximum(number.sum(0), 1)
        picture = (self.grey * number).sum(0) / seen  # (h·w,)
        for _ in range(ROUNDS):
            level = _mean(self.grey - picture, number)[:, None]
            picture = ((self.grey - level) * number).sum(0) / seen
        rest = self.grey - picture - level
        groups = np.array_split(np.arange(len(rest)), min(GROUPS, len(rest)))
        numbers = np.array([number[at].sum(0) for at in groups])  # (groups, h·w)
        sums = np.array([(rest[at] * number[at]).sum(0) for at in groups])
        between = (sums * sums / np.maximum(numbers, 1)).sum()
        within = (rest * rest * number).sum() - between
        free = (number > 0).sum() - (numbers > 0).sum() - len(rest) + len(groups)
        free_between = (numbers > 0).sum() - (seen > 1).sum() - len(groups) + 1
        noise = _noise(free_between, within / max(free, 1))
        (variance,) = _spread(picture[None], number.sum(0)[None])[2]
        return between > MOVED * variance * number.sum() + noise

    @cached_property
    def cuts(self) -> list[int]:
        """First frames of new shots; a frame that mixes its neighbours is of the one it shows more.

        Codecs that code frames in groups leave such a frame beside a cut.
        """
        times = np.arange(len(self._frames))
        changed = self.changes(times[:-1], times[1:])
        for at in np.nonzero(changed[:-1] & changed[1:])[0] + 1:
            before, after = self._shares(at)
            if before > 0 and after > 0:
                changed[at if after > before else at - 1] = False
        return (np.nonzero(changed)[0] + 1).tolist()

    def _shares(self, at: int) -> np.ndarray:
        """Shares (2,) of the frames before and after a frame in what it shows, 0 if they do not
        make it up."""
        near = slice(at - 1, at + 2)
        weight = np.broadcast_to(self.number[near].min(0), self.number[near].shape)
        _, (before, here, after), (_, variance, _) = _spread(self.grey[near], weight)
        root = np.sqrt(weight[0])
        pair = np.stack([before, after], 1) * root[:, None]
        shares = np.linalg.lstsq(pair, here * root, rcond=None)[0]
        rest = ((here * root - pair @ shares) ** 2).sum()
        return shares * (rest < MIXED * variance * weight[0].sum())


def _mean(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Of each row of (n, m), (n,)."""
    return (values * weight).sum(1) / np.maximum(weight.sum(1), 1e-6)


def _spread(values: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (n,) of each row of (n, m), what differs from it, and the variance (n,)."""
    mean = _mean(values, weight)
    off = values - mean[:, None]
    return mean, off, _mean(off * off, weight)


def _noise(free: np.ndarray, variance: float) -> np.ndarray:
    """What so many squares (n,) of noise of a variance sum to at most: chi-square, as a normal."""
    return variance * (free + SURE * np.sqrt(2 * np.maximum(free, 0)))
