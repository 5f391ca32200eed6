"""How the camera moves, from what the background does: pan, tilt and zoom by least squares.

Gauss-Newton on blurred frames, coarse to fine (Lucas and Kanade 1981; Bergen et al. 1992): first
one motion for the whole clip, which finds long steps, then one for every pair of frames. As the
camera never rolls, blurring and warping are separable, and so products with small matrices.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

COARSE, FINE = 2, 1  # px from sample to sample; the blur is 0.8 of it
STAGES = ((COARSE, "clip"),) * 3 + ((COARSE, "pair"),) + ((FINE, "pair"),) * 2
LONGEST = np.array([1.5, 1.5, 0.1], np.float32)  # px, px, log factor: what one step may correct


@dataclass(frozen=True, slots=True)
class CameraMotion:
    """Where the background has gone since the first of T frames.

    A point at p from the frame's centre at first is at exp(log_zoom) p + (x, y) in frame t (px).
    `is_one_take` is false where no such motion makes a frame of the one before.
    """

    x: np.ndarray  # (T,)
    y: np.ndarray
    log_zoom: np.ndarray
    is_one_take: bool


def background_motion(grey: np.ndarray, clean: np.ndarray) -> CameraMotion:
    """Motion of the pixels marked `clean` in frames `grey`, both float32 (T, H, W)."""
    motion = np.zeros((len(grey) - 1, 3), np.float32)  # x, y, log zoom of every pair of frames
    if len(motion):
        levels = {stride: _Level(grey, clean, stride) for stride in (COARSE, FINE)}
        for stride, whose in STAGES:
            motion = motion + levels[stride].correction(motion, is_shared=whose == "clip")
        is_one_take = levels[FINE].is_explained_by(motion)
    else:
        is_one_take = True
    motion = np.concatenate([np.zeros((1, 3)), motion])
    log_zoom = motion[:, 2].cumsum()
    x, y = np.exp(log_zoom) * (motion[:, :2].T * np.exp(-log_zoom)).cumsum(1)
    return CameraMotion(x, y, log_zoom, is_one_take)


class _Level:
    """The frames at one resolution, and how neighbours differ under a motion (T - 1, 3)."""

    def __init__(self, grey: np.ndarray, clean: np.ndarray, stride: int) -> None:
        height, width = grey.shape[1:]
        rows, cols = _blur(height, stride), _blur(width, stride).T
        support = rows @ clean @ cols
        self.stride = stride
        self.y, self.x = _samples(height, stride), _samples(width, stride)
        self.soft = rows @ (grey * clean) @ cols / np.maximum(support, 1e-3)  # (T, h, w)
        # a blur cut off by a border or an entity is one of other places: it counts for little
        self.weight = clean[:, ::stride, ::stride] * (support / max(support.max(), 1e-3)) ** 4

    def compare(self, motion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Next frames warped back (T - 1, h, w), what each lacks of its frame, and the weights."""
        factor = np.exp(motion[:, 2:])
        to_y, in_y = _warp(self.y, self.y * factor + motion[:, 1:2])
        to_x, in_x = _warp(self.x, self.x * factor + motion[:, :1])
        to_x = to_x.transpose(0, 2, 1)
        ahead = to_y @ self.soft[1:] @ to_x
        weight = self.weight[:-1] * (to_y @ self.weight[1:] @ to_x)
        weight *= in_y[:, :, None] & in_x[:, None, :]
        return ahead, self.soft[:-1] - ahead, weight

    def correction(self, motion: np.ndarray, is_shared: bool) -> np.ndarray:
        """Gauss-Newton step from a motion: (T - 1, 3), or (1, 3) where all pairs share it."""
        ahead, rest, weight = self.compare(motion)
        # slopes of the mean of both, or their noise would look like a zoom
        slope_y, slope_x = np.gradient(0.5 * (self.soft[:-1] + ahead), self.stride, axis=(1, 2))
        slope_zoom = slope_x * self.x + slope_y * self.y[:, None]
        jacobian = np.stack([slope_x, slope_y, slope_zoom], 1).reshape(len(motion), 3, -1)
        weighed = jacobian * weight.reshape(len(motion), 1, -1)
        hessian = weighed @ jacobian.transpose(0, 2, 1)  # (T - 1, 3, 3)
        wanted = weighed @ rest.reshape(len(motion), -1, 1)
        if is_shared:
            hessian, wanted = hessian.sum(0, keepdims=True), wanted.sum(0, keepdims=True)
        ridge = np.array([1.0, 1.0, self.y[0] * self.x[0] / 3], np.float32)
        hessian += np.diag(ridge * 1e-3 * max(float(weight.sum()) / len(hessian), 1.0))
        return np.clip(np.linalg.solve(hessian, wanted)[..., 0], -LONGEST, LONGEST)

    def is_explained_by(self, motion: np.ndarray) -> bool:
        """Whether in every pair the warped frame has most of the other's texture, if it has one."""
        _, rest, weight = self.compare(motion)
        if (weight.mean((1, 2)) < 0.05).any():
            return False
        return bool((_spread(rest, weight) < 0.5 * _spread(self.soft[:-1], weight) + 4.0).all())


def _spread(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted variance in every frame, (T,)."""
    total = weight.sum((1, 2))
    mean = (values * weight).sum((1, 2)) / total
    return (weight * (values - mean[:, None, None]) ** 2).sum((1, 2)) / total


def _samples(size: int, stride: int) -> np.ndarray:
    """Places of the samples from the frame's centre, px."""
    return np.arange(0, size, stride, dtype=np.float32) - (size - 1) / 2


@cache
def _blur(size: int, stride: int) -> np.ndarray:
    """Gaussian weights (samples, size)."""
    at = _samples(size, 1)
    return np.exp(-0.5 * ((at[::stride, None] - at) / (0.8 * stride)) ** 2)


def _warp(grid: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (T, n, n) of linear interpolation at `at` (T, n), and whether that is in the grid."""
    inside = (at > grid[0] - 0.5) & (at < grid[-1] + 0.5)
    at = np.clip(at, grid[0], grid[-1])
    return np.maximum(1 - abs(at[..., None] - grid) / (grid[1] - grid[0]), 0.0), inside
