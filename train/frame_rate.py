"""Frames per second of what a run draws: its training clips', unless somebody says others."""

from __future__ import annotations

import numpy as np

from longtake.data.catalogue import load_catalogue
from longtake.train.schema import DiTRun

DEFAULT_FPS = 8.0  # of videos where the clips had several rates, or cannot be looked up


def drawn_rate(config: DiTRun, frames: int) -> float:
    """Frames per second of a clip of so many frames, as training tells it: `data.fps`, or the rate
    of the training clips; an image has 0 where nothing says otherwise."""
    if config.data.fps is not None:
        return config.data.fps
    known = catalogue_rate(config, is_image=frames == 1)
    return known if known is not None else 0.0 if frames == 1 else DEFAULT_FPS


def catalogue_rate(config: DiTRun, *, is_image: bool = False) -> float | None:
    """The one rate of the training images, or of the training clips that move; `encode` may have
    set that of cached latents. None for several rates, for no such clips, and for data that is no
    longer there."""
    rates: list[np.ndarray] = []
    for dataset in config.data.train:
        try:
            found = load_catalogue(dataset.path, dataset.catalogue).filter(dataset.where)
        except (OSError, ValueError):
            return None
        frames, fps = (found.catalogue.table[name].to_numpy() for name in ("frames", "fps"))
        rates.append(fps[(frames == 1) == is_image])
    known = np.unique(np.concatenate(rates))
    return float(known[0]) if len(known) == 1 else None
