"""Frames per second of what a run draws: its training clips', unless somebody says others."""

from __future__ import annotations

import os
import warnings
from functools import cache

import numpy as np

from longtake.data.catalogue import open_manifest, read_parts
from longtake.data.catalogue.filters import apply_filter
from longtake.train.schema import DiTRun

RATE_COLUMNS = "frames", "fps"
DEFAULT_FPS = 8.0  # of videos where the clips had several rates, or cannot be looked up


def drawn_rate(config: DiTRun, frames: int) -> float:
    """That of `drawn_rates` for a clip of so many frames."""
    return drawn_rates(config, has_videos=frames > 1)[frames == 1]


def drawn_rates(config: DiTRun, has_videos: bool = True) -> tuple[float, float]:
    """Frames per second of clips and of images, as training tells them: `data.fps`, or the rates of
    the training data; images have 0 where nothing says otherwise. Rank 0 warns where nothing tells
    the rate of videos, if any are drawn."""
    if config.data.fps is not None:
        return config.data.fps, config.data.fps
    clips, images = catalogue_rates(config)
    is_main = os.environ.get("RANK", "0") == "0"  # also before the ranks have joined
    has_videos = has_videos and any(bucket.frames > 1 for bucket in config.data.buckets)
    if clips is None and has_videos and is_main:
        warn_of_default()
    return DEFAULT_FPS if clips is None else clips, 0.0 if images is None else images


@cache
def warn_of_default() -> None:
    """Once, whoever asks how often."""
    warnings.warn(
        "data.train has clips of several rates, or is no longer there: videos are drawn and told "
        f"as of {DEFAULT_FPS:g} frames per second; set data.fps for another rate",
        stacklevel=3,
    )


def catalogue_rates(config: DiTRun) -> tuple[float | None, float | None]:
    """The one rate of the training clips that move, and that of the images; `encode` may have set
    those of cached latents. None for several rates, for no such clips, and for data that is no
    longer there."""
    frames, fps = [], []
    for dataset in config.data.train:
        where = dataset.where.strip()  # may ask for any column
        try:
            manifest = open_manifest(dataset.path, dataset.catalogue)
            table = read_parts(manifest, list(manifest.shards), None if where else RATE_COLUMNS)
            table = apply_filter(table, where, manifest.dataset)[0] if where else table
        except (OSError, ValueError):
            return None, None
        frames.append(table["frames"].to_numpy())
        fps.append(table["fps"].to_numpy())
    is_image, rates = np.concatenate(frames) == 1, np.concatenate(fps)
    return _only(rates[~is_image]), _only(rates[is_image])


def _only(rates: np.ndarray) -> float | None:
    known = np.unique(rates)
    return float(known[0]) if len(known) == 1 else None
