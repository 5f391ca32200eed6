"""Clips for people: read, enlarge without blur, write as what every browser plays."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longtake.data.decode import encode_video, iter_frames, probe
from longtake.train.tasks import Drawing

VISIBLE = 256  # px: clips with a shorter side are enlarged up to about this
IMAGE_FPS = 8.0  # rate of the one-frame mp4 that an image becomes


@dataclass(frozen=True)
class Footage:
    """Frames uint8 (T, H, W, 3) RGB and their rate per second."""

    frames: np.ndarray
    fps: float


def read_footage(data: bytes) -> Footage:
    """Every frame of an encoded clip or image. DecodeError (a ValueError) with the reason."""
    frames = np.stack(list(iter_frames(data, 0.0, math.inf)))
    return Footage(frames, probe(data).fps or IMAGE_FPS)


def read_footage_file(path: Path) -> Footage:
    """`read_footage` of a file; ValueError naming it when it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return read_footage(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def enlarge(frames: np.ndarray, factor: int | None = None) -> np.ndarray:
    """Frames (T, H, W, 3) with every pixel `factor` times as large; None: to a visible size."""
    if factor is None:
        factor = max(VISIBLE // min(frames.shape[1:3]), 1)
    if factor < 1:
        raise ValueError(f"--upscale {factor} must be a whole number >= 1")
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def viewing_mp4(frames: np.ndarray, fps: float, factor: int | None = None) -> bytes:
    """H.264 4:2:0, enlarged first: halved chroma would wash out small saturated shapes."""
    large = enlarge(frames, factor)
    height, width = large.shape[1] // 2 * 2, large.shape[2] // 2 * 2
    return encode_video(large[:, :height, :width], fps, crf=18, pixel_format="yuv420p")


def to_frames(video: Tensor) -> np.ndarray:
    """Pixels (C, T, H, W) in [-1, 1], clamped → uint8 (T, H, W, 3)."""
    pixels = video.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).cpu().numpy()


def to_pixels(frames: np.ndarray) -> Tensor:
    """uint8 (T, H, W, 3) → float (C, T, H, W) in [-1, 1]."""
    return torch.from_numpy(frames.copy()).permute(3, 0, 1, 2).float().div(127.5).sub(1)


def write_drawings(folder: Path, drawings: Sequence[Drawing]) -> dict[str, Path]:
    """One mp4 for each drawing and prompts.json beside them; returns the files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {drawing.name: folder / f"{drawing.name}.mp4" for drawing in drawings}
    for drawing in drawings:
        files[drawing.name].write_bytes(viewing_mp4(drawing.frames, drawing.fps or IMAGE_FPS))
    captions = {drawing.name: drawing.caption for drawing in drawings}
    text = json.dumps(captions, indent=1, ensure_ascii=False)
    (folder / "prompts.json").write_text(text, encoding="utf-8")
    return files
