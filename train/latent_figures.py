"""What a latent space is like: moments per channel, dead channels, how much is fine detail."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longtake.models.vae import Posterior
from longtake.train.tasks import Means

HIDDEN = "latent."  # names of raw sums, which the summary takes away
DEAD_SIGNAL = 0.01  # share of a channel's variance: one whose mean varies less carries nothing


class LatentFigures:
    """Raw moments that add up over batches and ranks, and their summary.

    Reported: mean and standard deviation over channels of what the channels' own figures are
    (`latent_std`, `latent_std_min`, `latent_std_max`, `latent_mean_max`: largest |mean|),
    `latent_kurtosis_max` (3 for a normal one), `latent_dead`: share of channels that carry nothing,
    `latent_fine`: share of power above half of the highest spatial frequency (white noise has about
    3/4; what a diffusion model cannot predict hides there, arXiv 2502.14831), as
    `latent_fine/9x16x16` of a bucket, too, and per channel `latent_channel/03/std` and
    `latent_channel/03/signal`.

    The signal of a channel is the variance of its posterior mean in that of a posterior sample,
    var(μ) / (var(μ) + E[σ²]). It is the activity of arXiv 1509.00519 §5.2, var(μ) > 0.01, for
    samples of any variance: the prior's 1, which that threshold is meant for, holds under a strong
    KL term only.
    """

    def __init__(self, z_dim: int) -> None:
        self.z_dim = z_dim

    def add(self, means: Means, posterior: Posterior, bucket: str) -> None:
        """Count posteriors over (B, Z, T, H, W) of clips of a bucket."""
        values = _by_channel(posterior.mean)
        count = values.shape[1]
        noise = _by_channel(posterior.logvar).exp().sum(1)
        for channel, total in enumerate(noise.tolist()):
            means.add(f"{HIDDEN}noise.{channel}", total, count)
        for power in range(1, 5):
            for channel, total in enumerate(values.pow(power).sum(1).tolist()):
                means.add(f"{HIDDEN}{power}.{channel}", total, count)
        fine, whole = fine_power(posterior.mean)
        if whole > 0:
            for name in ("latent_fine", f"latent_fine/{bucket}"):
                means.add(name, fine, whole)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """The row without raw moments and with what they say."""
        row = {name: value for name, value in means.items() if not name.startswith(HIDDEN)}
        if f"{HIDDEN}1.0" not in means:
            return row
        first, second, third, fourth = (
            [means[f"{HIDDEN}{power}.{channel}"] for channel in range(self.z_dim)]
            for power in range(1, 5)
        )
        noises = [means[f"{HIDDEN}noise.{channel}"] for channel in range(self.z_dim)]
        stds, kurtoses, signals = [], [], []
        for m1, m2, m3, m4, noise in zip(first, second, third, fourth, noises, strict=True):
            variance = max(m2 - m1**2, 0.0)
            central = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
            stds.append(math.sqrt(variance))
            kurtoses.append(central / variance**2 if variance > 0 else 0.0)
            signals.append(variance / (variance + noise))
        dead = sum(signal <= DEAD_SIGNAL for signal in signals) / len(signals)
        row |= {
            "latent_std": sum(stds) / len(stds),
            "latent_std_min": min(stds),
            "latent_std_max": max(stds),
            "latent_mean_max": max(map(abs, first)),
            "latent_kurtosis_max": max(kurtoses),
            "latent_dead": dead,
        }
        figures = {"mean": first, "std": stds, "kurtosis": kurtoses, "signal": signals}
        for figure, values in figures.items():
            for channel, value in enumerate(values):
                row[f"latent_channel/{channel:02d}/{figure}"] = value
        return row


def _by_channel(values: Tensor) -> Tensor:
    return values.double().transpose(0, 1).flatten(1)  # (Z, B·T·H·W)


def fine_power(latents: Tensor) -> tuple[float, float]:
    """Power of (B, Z, T, H, W) above half of the highest spatial frequency, and in all of them.

    The mean of each frame is left out; frames of one position have no frequency at all.
    """
    height, width = latents.shape[-2:]
    spectrum = torch.fft.fft2(latents.double()).abs().square()
    rows = torch.fft.fftfreq(height, device=latents.device).abs()
    columns = torch.fft.fftfreq(width, device=latents.device).abs()
    highest = torch.maximum(rows[:, None], columns[None])  # (H, W), up to 0.5 cycles per latent
    whole = spectrum[..., highest > 0].sum().item()
    return spectrum[..., highest > 0.25].sum().item(), whole
