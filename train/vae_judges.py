"""Judges of a VAE's reconstructions in validation: the world's scorers and the video distance."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.data.config import shape_name
from longtake.data.loader import Clip
from longtake.data.plan.val_plan import ValPlan
from longtake.data.world import score_clip
from longtake.train.checks import require
from longtake.train.fidelity import VideoDetector, check_enough_clips, frechet_distance
from longtake.train.playback import to_frames
from longtake.train.ranks import Ranks
from longtake.train.schema import VAERun

FVD_KEY = "validation.fvd_weights"


def world_scores(clip: Clip, pixels: Tensor) -> dict[str, float]:
    """`world/FAMILY/SCORE` of a reconstruction (3, T, H, W) in [-1, 1]: what a DiT behind this VAE
    can reach at most.

    Empty for a clip whose truth record is missing or does not hold for what is shown of it: one
    with planted defects, or one that was cut or scaled.
    """
    truth = clip.truth
    if truth is None or not _holds(truth, clip.sample.shape):
        return {}
    scores = score_clip(to_frames(pixels), truth)
    return {f"world/{truth['family']}/{name}": value for name, value in scores.items()}


def _holds(truth: dict[str, Any], shape: tuple[int, int, int]) -> bool:
    drawn = tuple(truth.get(name) for name in ("frames", "height", "width"))
    return "expect" in truth and not truth.get("defects") and drawn == shape


class ReconstructionDistance:
    """rFVD: the Fréchet video distance between clips and their reconstructions, all ranks together.

    Images are left out: a detector of motion cannot take them. `scarce` names buckets of which a
    pass shows too few videos for a distance of their own, and how many it shows.
    """

    def __init__(self, config: VAERun, path: str, ranks: Ranks) -> None:
        """ValueError for a detector that cannot take the buckets, or for too few clips."""
        self.ranks = ranks
        self.detector = VideoDetector(Path(path), ranks.device, FVD_KEY)
        shapes = [b.shape for b in config.data.buckets if b.frames > 1]
        require(
            len(shapes) > 0,
            f"{FVD_KEY}={path} needs clips of more than one frame, data.buckets has images only: "
            "set it to null",
        )
        self.num_features = max(
            self.detector(torch.zeros(1, 3, *shape)).shape[1] for shape in shapes
        )
        check_enough_clips(config.validation.num_samples, self.num_features, FVD_KEY)
        self.scarce: dict[str, int] = {}
        self.clear()

    def check_pass(self, plan: ValPlan) -> None:
        """See what a validation pass shows; ValueError for too few clips that are no images."""
        shapes = Counter(s.shape for batch in plan.micro_batches(0, 1) for s in batch.samples)
        by_bucket = {shape_name(shape): n for shape, n in shapes.items() if shape[0] > 1}
        videos = sum(by_bucket.values())
        require(
            videos > self.num_features,
            f"validation.num_samples={plan.num_samples} takes {videos} videos and "
            f"{shapes.total() - videos} images of data.val; the {self.num_features} features of "
            f"the detector of {FVD_KEY} need more than {self.num_features} videos: raise it, give "
            f"more videos, or set {FVD_KEY} to null",
        )
        self.scarce = {bucket: n for bucket, n in by_bucket.items() if n <= self.num_features}

    def clear(self) -> None:
        """Forget all clips: a new pass begins."""
        self._features = _no_features()  # of each bucket

    def add(self, drawn: Tensor, truth: Tensor) -> None:
        """Count clips (B, 3, T, H, W) in [0, 1]."""
        if truth.shape[2] > 1:
            mine = self._features[shape_name(truth.shape[2:])]
            for features, clips in zip(mine, (truth, drawn), strict=True):
                features += self.detector(clips).tolist()

    def values(self) -> dict[str, float]:
        """The distance over all ranks' clips and, as `rfvd/9x16x16`, over those of each bucket that
        has enough of them; on every rank. ValueError where too few were read in all."""
        found = _no_features()
        for of_rank in self.ranks.gather(self._features):
            for bucket, both in of_rank.items():
                for name in ("rfvd", f"rfvd/{bucket}"):
                    for features, more in zip(found[name], both, strict=True):
                        features += more
        check_enough_clips(len(found["rfvd"][0]), self.num_features, FVD_KEY)
        return {
            name: frechet_distance(torch.tensor(truth), torch.tensor(drawn))
            for name, (truth, drawn) in found.items()
            if len(truth) > self.num_features
        }


def _no_features() -> defaultdict[str, tuple[list[list[float]], list[list[float]]]]:
    """Features of the truth and of what was drawn, by name."""
    return defaultdict(lambda: ([], []))
