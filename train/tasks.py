"""What a stage trains: the loss of a batch, its validation, and what it draws to look at.

A task never sees ranks. Its loss is a sum over the samples of a micro-batch; the trainer divides by
the global step's total weight, so slots of any content count alike on any number of ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from longtake.data.loader import Batch
from longtake.data.plan import PlannedSample
from longtake.data.randomness import generator
from longtake.models.vae import VAE, Posterior
from longtake.train.engine import Engine
from longtake.train.playback import to_frames
from longtake.train.schema import VAERun

MSE_TO_UNIT = 0.25  # squared error of pixels in [-1, 1] -> in [0, 1], where PSNR's peak is 1


@dataclass(frozen=True)
class LossSum:
    """Sums over a micro-batch, each to be divided by the weight of the global step.

    total () fp32 carries the gradient; parts are detached () tensors to be logged under their name.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawing:
    """A clip to look at: frames uint8 (T, H, W, 3) and what it shows."""

    name: str
    frames: np.ndarray
    fps: float
    caption: str


class Means:
    """Running means by name, to be added up over ranks."""

    def __init__(self) -> None:
        self.sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, total: float, weight: float) -> None:
        """Count a sum of values of that total weight."""
        self.sums[name][0] += total
        self.sums[name][1] += weight

    def merged(self, others: Iterable[dict[str, list[float]]]) -> dict[str, float]:
        """Means over all ranks' sums, in the order of the names."""
        everything = Means()
        for other in others:
            for name, (total, weight) in other.items():
                everything.add(name, total, weight)
        return {name: total / weight for name, (total, weight) in sorted(everything.sums.items())}


class Task(Protocol):
    """One stage. `module` is what the engine trains; every rank calls everything alike."""

    @property
    def module(self) -> nn.Module: ...

    def weight(self, sample: PlannedSample) -> float:
        """What the sample counts in the denominator of the step."""
        ...

    def tokens(self, sample: PlannedSample) -> int:
        """Positions the model works on for this sample, for the throughput."""
        ...

    def loss(self, engine: Engine, batch: Batch) -> LossSum: ...

    def validate(self, engine: Engine, batches: Iterable[Batch]) -> Means:
        """Sums over a rank's share of the validation pass, with the weights now in the module."""
        ...

    def draw(self, engine: Engine, batches: Sequence[Batch]) -> list[Drawing]:
        """Clips to look at; `batches` is the head of the validation pass, the same on all ranks."""
        ...


class VAETask:
    """Reconstruct the clip: weighted L1 and squared error plus KL (arXiv 1312.6114 eq. 10).

    L1 alone asks for the median: from scratch, small things on a plain ground stay invisible for
    long. The squared error finds them first.
    """

    def __init__(self, config: VAERun, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.module = VAE(config.vae)

    def weight(self, sample: PlannedSample) -> float:
        """Pixels of the clip: every pixel counts alike."""
        frames, height, width = sample.shape
        return float(frames * height * width)

    def tokens(self, sample: PlannedSample) -> int:
        """Latent positions of the clip; ValueError where the VAE cannot take its size."""
        frames, height, width = self.config.vae.latent_shape(*sample.shape)
        return frames * height * width

    def loss(self, engine: Engine, batch: Batch) -> LossSum:
        video = batch.stack_video().to(self.device)  # (B, 3, T, H, W)
        samples = [clip.sample for clip in batch.clips]
        shape = (self.config.vae.z_dim, *self.config.vae.latent_shape(*video.shape[2:]))
        noise = normal_draws(samples, shape, "posterior").to(self.device)
        pixels, posterior = engine(video, noise)
        weights = torch.tensor([self.weight(s) for s in samples], device=self.device)
        error = pixels.float() - video
        l1 = error.abs().flatten(1).mean(1)  # (B,)
        mse = error.square().flatten(1).mean(1)  # (B,)
        kl = posterior.kl() / posterior.mean[0].numel()  # (B,) nats per latent value
        loss = self.config.loss
        total = (weights * (loss.l1 * l1 + loss.mse * mse + loss.kl * kl)).sum()
        parts = {"l1": l1, "mse": mse, "kl": kl}
        return LossSum(total, {name: (weights * x).sum().detach() for name, x in parts.items()})

    @torch.no_grad()
    def validate(self, engine: Engine, batches: Iterable[Batch]) -> Means:
        """PSNR in dB of the posterior mean's reconstruction, averaged over clips."""
        means = Means()
        for batch in batches:
            video = batch.stack_video().to(self.device)
            pixels, posterior = self._reconstruct(engine, video)
            error = (pixels - video).square().flatten(1).mean(1) * MSE_TO_UNIT  # (B,)
            psnr = -10.0 * torch.log10(error.clamp_min(1e-10))
            spread = posterior.mean.float().std(dim=(0, 2, 3, 4), correction=0).mean().item()
            if not batch.counted:  # keeps the ranks in step, belongs to nobody
                continue
            count = len(batch.clips)
            means.add("psnr", psnr.sum().item(), count)
            means.add("l1", (pixels - video).abs().flatten(1).mean(1).sum().item(), count)
            means.add("latent_std", spread * count, count)
        return means

    @torch.no_grad()
    def draw(self, engine: Engine, batches: Sequence[Batch]) -> list[Drawing]:
        """Truth to the left, reconstruction to the right."""
        drawings = []
        for batch in batches:
            video = batch.stack_video().to(self.device)
            pixels, _ = self._reconstruct(engine, video)
            pairs = torch.cat((video, pixels), dim=-1)  # (B, 3, T, H, 2W)
            for clip, pair in zip(batch.clips, pairs, strict=True):
                name = f"reconstruction-{len(drawings):02d}"
                drawings.append(Drawing(name, to_frames(pair), clip.fps, clip.caption))
        return drawings

    def _reconstruct(self, engine: Engine, video: Tensor) -> tuple[Tensor, Posterior]:
        """Clamped pixels and posterior, without posterior noise."""
        shape = (self.config.vae.z_dim, *self.config.vae.latent_shape(*video.shape[2:]))
        silence = torch.zeros((len(video), *shape), device=self.device)
        pixels, posterior = engine(video, silence)
        return pixels.float().clamp(-1, 1), posterior


def normal_draws(samples: Sequence[PlannedSample], shape: tuple[int, ...], purpose: str) -> Tensor:
    """Standard normal (B, *shape), each row from its own sample's seed: equal on any rank."""
    rows = [torch.randn(shape, generator=generator(s.seed, purpose)) for s in samples]
    return torch.stack(rows)
