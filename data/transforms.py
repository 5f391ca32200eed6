"""From decoded frames to a clip of the bucket's shape: cover, crop, scale values."""

import numpy as np
import torch
from torch import Tensor


def covering_size(
    height: int, width: int, target_height: int, target_width: int
) -> tuple[int, int]:
    """The smallest (height, width) of the source's aspect ratio that covers the target."""
    scale = max(target_height / height, target_width / width)
    return max(target_height, round(height * scale)), max(target_width, round(width * scale))


def corner(free: tuple[int, int], at: tuple[float, float]) -> tuple[int, int]:
    """(y, x) in pixels of the cut that lies at the fractions `at` of the `free` space (y, x)."""
    y, x = (min(int(part * (space + 1)), space) for part, space in zip(at, free, strict=True))
    return y, x


def crop_clip(frames: np.ndarray, height: int, width: int, at: tuple[float, float]) -> Tensor:
    """Cut frames uint8 (T, H, W, 3) to a clip uint8 (3, T, height, width).

    `at` = (y, x) says where the cut lies in the free space: 0 top or left, 0.5 centre, 1 bottom or
    right.

    Raises:
        ValueError: the frames are smaller than the cut.
    """
    free_y, free_x = frames.shape[1] - height, frames.shape[2] - width
    if free_y < 0 or free_x < 0:
        raise ValueError(f"frames {frames.shape} are smaller than the crop {height}x{width}")
    y, x = corner((free_y, free_x), at)
    cut = frames[:, y : y + height, x : x + width]  # (T, H, W, 3)
    return torch.from_numpy(np.ascontiguousarray(cut.transpose(3, 0, 1, 2)))  # (3, T, H, W)


def to_float(video: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1], any shape."""
    return video.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(video: Tensor) -> Tensor:
    """Float in [-1, 1] to uint8, values outside clamped; undoes `to_float`."""
    return video.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
