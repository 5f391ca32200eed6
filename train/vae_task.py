"""The video autoencoder's task: reconstruct the clip, please the critic, keep latents near normal.

The objective is that of a VAE (arXiv 1312.6114 eq. 10) with a weight per term; the adversarial term
is that of VQGAN (arXiv 2012.09841).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from longtake.data.config import shape_name
from longtake.data.loader import Batch
from longtake.data.plan.planned import PlannedSample
from longtake.data.randomness import uniform
from longtake.models.cost import vae_forward_flops
from longtake.models.transfer import to_device
from longtake.models.vae import VAE, Posterior
from longtake.train import fidelity, vae_losses
from longtake.train.adversary import Adversary
from longtake.train.engine import Engine, Ranks
from longtake.train.latent_figures import LatentFigures
from longtake.train.optim import freeze
from longtake.train.playback import to_frames
from longtake.train.schema import VAERun
from longtake.train.tasks import Drawing, LossSum, Means, normal_draws
from longtake.train.vae_judges import FVD_KEY, ReconstructionDistance, world_scores
from longtake.train.vae_schema import changes, measured_terms

ERRORS = {
    "l1": vae_losses.absolute,
    "mse": vae_losses.squared,
    "charbonnier": vae_losses.charbonnier,
    "detail": vae_losses.detail,
    "flicker": vae_losses.flicker,
    "chroma": vae_losses.chroma,
}


def change_(video: Tensor, samples: Sequence[PlannedSample], cuts: float, fades: float) -> None:
    """Make shares of the clips (B, 3, T, H, W) another picture from a drawn frame on: `cuts` at
    once, `fades` over a drawn time. It is red for blue, up to half as dark, half of the time turned
    by half a circle, and half of the time negative.

    Footage is cut and faded at any frame, and things change at once or gradually. Then one latent
    frame holds several pictures, which most corpora show too seldom for it to be learned.
    """
    last = video.shape[2] - 1
    for clip, sample in zip(video, samples, strict=True):
        draw = partial(uniform, sample.seed)
        kind = draw("change")
        if kind >= cuts + fades or last == 0:
            continue
        light = 0.5 + 0.5 * draw("change.light")
        other = clip.flip(0)
        if draw("change.turned") < 0.5:
            other = other.flip(2, 3)
        if draw("change.negative") < 0.5:
            other = -other
        other = (other + 1) * light - 1
        lasting = 0.0 if kind < cuts else 1 + draw("change.lasting") * (last - 1)  # frames
        since = torch.arange(last + 1) - draw("change.at") * (last - lasting)
        share = (since / lasting).clamp(0, 1) if lasting else (since > 0).float()
        clip.lerp_(other, share[:, None, None])


class VAETask:
    """Weighted reconstruction terms plus KL, and an adversary where the config has one."""

    def __init__(self, config: VAERun, ranks: Ranks) -> None:
        self.config = config
        self.device = ranks.device
        for bucket in config.data.buckets:
            config.vae.latent_shape(*bucket.shape)
        self.module = VAE(config.vae)
        freeze(self.module, config.freeze)
        if config.speed.compile:
            self.module.compile_parts()
        self.terms = measured_terms(config.loss)
        term = config.loss.perceptual
        self.perceptual = (
            vae_losses.Perceptual(term.weights, term.frames, self.device)
            if term.weights is not None
            else None
        )
        weights = config.validation.fvd_weights
        self.distance = None if weights is None else ReconstructionDistance(config, weights, ranks)
        self.adversary = Adversary(config, ranks) if config.loss.adversarial.weight > 0 else None

    def weight(self, batch: Batch) -> float:
        """Pixels of the clips: every pixel counts alike."""
        return float(sum(math.prod(sample.shape) for sample in batch.samples))

    def tokens(self, batch: Batch) -> int:
        """Latent positions of the clips; ValueError where the VAE cannot take their size."""
        shapes = (self.config.vae.latent_shape(*sample.shape) for sample in batch.samples)
        return sum(map(math.prod, shapes))

    def flops(self, batch: Batch) -> float:
        """Of a training step of the VAE; losses and discriminator are left out."""
        return 3.0 * sum(vae_forward_flops(self.config.vae, *s.shape) for s in batch.samples)

    def loss(self, engine: Engine, batch: Batch) -> LossSum:
        """Terms of optimizer step `batch.step`; the critic's lesson comes with it."""
        samples = batch.samples
        video = batch.stack_video()  # (B, 3, T, H, W)
        if self.config.cuts or self.config.fades:
            change_(video, samples, self.config.cuts, self.config.fades)
        video = to_device(video, self.device)
        noise = normal_draws(samples, self._latent_shape(video), "posterior")
        pixels, posterior = engine(video, to_device(noise, self.device))
        pixels = pixels.float()
        weights = torch.tensor([float(math.prod(s.shape)) for s in samples])
        weights = to_device(weights, self.device)
        adversary, step = self.adversary, batch.step
        if adversary is not None:
            adversary.settle()  # the device has had this forward to do meanwhile
        heard = adversary is not None and adversary.is_heard(step)
        # The adaptive weight needs gradients at the pixels before there is a backward of the VAE.
        seen = pixels.detach().requires_grad_() if heard else pixels
        terms = self._measure(seen, video)
        kl = posterior.kl() / posterior.mean[0].numel()  # (B,) nats per latent value
        rates = {name: term.at(step) for name, term in self.terms.items()}
        reconstruction = sum((rates[n] * terms[n] for n in terms), torch.zeros_like(kl))  # (B,)
        charged = (weights * reconstruction).sum()
        regular = (weights * self.config.loss.kl.at(step) * kl).sum()
        parts = {name: (weights * x).sum().detach() for name, x in {**terms, "kl": kl}.items()}
        if adversary is None:
            return LossSum(charged + regular, parts)
        adversary.watch(charged)
        if heard:
            (slope,) = torch.autograd.grad(charged, seen)
            away, said = adversary.charge(pixels, weights, slope)
            parts |= said
            push = ((slope + away) * pixels).sum()  # has that gradient; its value means nothing
            charged = charged.detach() + push - push.detach()
        if not adversary.learns(step):
            return LossSum(charged + regular, parts)
        lesson = adversary.lesson(pixels, video, weights, samples)
        return LossSum(charged + regular, parts | lesson.parts, critic=lesson.total)

    def changes_loss(self, step: int) -> bool:
        return changes(self.config.loss, step)

    def _measure(self, pixels: Tensor, video: Tensor) -> dict[str, Tensor]:
        """Every term with a weight, (B,) each."""
        error = pixels - video
        found = {name: ERRORS[name](error) for name in self.terms if name in ERRORS}
        if self.perceptual is not None and "perceptual" in self.terms:
            found["perceptual"] = self.perceptual(pixels, video)
        return found

    @torch.no_grad()
    def validate(self, engine: Engine, batches: Iterable[Batch]) -> Means:
        """How the posterior mean is reconstructed, and what the latents are like.

        PSNR (dB), SSIM, flicker beside the truth's, LPIPS where its file is given, L1: means over
        clips, `psnr/9x16x16` those of a bucket. Scores of `world_scores` likewise, over
        validation.score_share of the clips. rFVD likewise where its file is given, of buckets with
        videos enough. Latent figures as of `LatentFigures`.
        """
        latents = LatentFigures(self.config.vae.z_dim)
        if self.distance is not None:
            self.distance.clear()
        means = Means(latents.summary)
        for batch in batches:
            video = to_device(batch.stack_video(), self.device)
            pixels, posterior = self._reconstruct(engine, video)
            if not batch.counted:  # keeps the ranks in step, belongs to nobody
                continue
            bucket = shape_name(video.shape[2:])
            for name, values in self._figures(pixels, video).items():
                for key in (name, f"{name}/{bucket}"):
                    means.add(key, values.double().sum().item(), len(values))
            for name, value in self._scores(batch, pixels):
                for key in ("world", name, f"{name}/{bucket}"):
                    means.add(key, value, 1)
            if self.distance is not None:
                self.distance.add((pixels + 1) / 2, (video + 1) / 2)
            latents.add(means, posterior, bucket)
        if self.distance is not None:
            for name, value in self.distance.values().items():
                means.add(name, value, 1)
        return means

    def _scores(self, batch: Batch, pixels: Tensor) -> Iterator[tuple[str, float]]:
        """World scores of the reconstructions that are drawn to be scored, whichever the rank."""
        share = self.config.validation.score_share
        for clip, drawn in zip(batch.clips, pixels, strict=True):
            if uniform(clip.sample.seed, "world scores") < share:
                yield from world_scores(clip, drawn).items()

    def not_measured(self) -> list[str]:
        """What validation goes without, and what would have it measured."""
        gaps = []
        if self.perceptual is None:
            gaps.append("LPIPS: set loss.perceptual.weights to a TorchScript VGG-16 of yours")
        if self.distance is None:
            gaps.append(f"rFVD: set {FVD_KEY} to a TorchScript detector of yours, such as I3D")
        elif self.distance.scarce:
            listed = ", ".join(f"{name} ({n} videos)" for name, n in self.distance.scarce.items())
            gaps.append(
                f"rFVD of {listed} by itself: a bucket needs more than "
                f"{self.distance.num_features} videos: raise validation.num_samples"
            )
        return gaps

    def _figures(self, pixels: Tensor, video: Tensor) -> dict[str, Tensor]:
        """Per clip, (B,) each."""
        drawn, true = (pixels + 1) / 2, (video + 1) / 2
        found = {"psnr": fidelity.psnr(drawn, true), "l1": vae_losses.absolute(pixels - video)}
        if min(video.shape[-2:]) >= fidelity.SSIM_WINDOW:
            found["ssim"] = fidelity.ssim(drawn, true)
        if video.shape[2] >= 3:
            found["flicker"] = fidelity.flicker(drawn)
            found["flicker_of_truth"] = fidelity.flicker(true)
        if self.perceptual is not None:
            found["lpips"] = self.perceptual(pixels, video)
        return found

    @torch.no_grad()
    def draw(self, engine: Engine, batches: Sequence[Batch]) -> list[Drawing]:
        """Truth, reconstruction and their difference around grey, from left to right."""
        drawings = []
        for batch in batches:
            video = to_device(batch.stack_video(), self.device)
            pixels, _ = self._reconstruct(engine, video)
            triples = torch.cat((video, pixels, pixels - video), dim=-1)  # (B, 3, T, H, 3W)
            for clip, triple in zip(batch.clips, triples.clamp(-1, 1), strict=True):
                name = f"reconstruction-{len(drawings):02d}"
                drawings.append(Drawing(name, to_frames(triple), clip.fps, clip.caption))
        return drawings

    def _latent_shape(self, video: Tensor) -> tuple[int, ...]:
        """(Z, T', H', W') of each clip of a batch (B, 3, T, H, W)."""
        return self.config.vae.z_dim, *self.config.vae.latent_shape(*video.shape[2:])

    def _reconstruct(self, engine: Engine, video: Tensor) -> tuple[Tensor, Posterior]:
        """Clamped pixels and posterior, without posterior noise."""
        silence = torch.zeros((len(video), *self._latent_shape(video)), device=self.device)
        # Passes without gradients would have graphs of their own, which take longer to compile
        # than a validation saves by them.
        with torch.compiler.set_stance("force_eager"):
            pixels, posterior = engine(video, silence)
        return pixels.float().clamp(-1, 1), posterior
