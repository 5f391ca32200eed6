"""What a latent space is like: moments per channel, dead channels, how much is fine detail."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longtake.train.tasks import Means

HIDDEN = "latent."  # names of raw sums, which the summary takes away
DEAD_STD = 0.05  # of the liveliest channel's: one that varies less carries nothing


class LatentFigures:
    """Raw moments that add up over batches and ranks, and their summary.

    Reported: mean and standard deviation over channels of what the channels' own figures are
    (`latent_std`, `latent_std_min`, `latent_std_max`, `latent_mean_max`: largest |mean|),
    `latent_kurtosis_max` (3 for a normal one), `latent_dead`: share of channels that carry nothing,
    `latent_fine`: share of power above half of the highest spatial frequency (white noise has about
    3/4; what a diffusion model cannot predict hides there, arXiv 2502.14831), and per channel
    `latent_channel/03/std`.
    """

    def __init__(self, z_dim: int) -> None:
        self.z_dim = z_dim

    def add(self, means: Means, latents: Tensor) -> None:
        """Count posterior means (B, Z, T, H, W), fp32."""
        values = latents.double().transpose(0, 1).flatten(1)  # (Z, B·T·H·W)
        count = values.shape[1]
        for power in range(1, 5):
            for channel, total in enumerate(values.pow(power).sum(1).tolist()):
                means.add(f"{HIDDEN}{power}.{channel}", total, count)
        fine, whole = fine_power(latents)
        if whole > 0:
            means.add("latent_fine", fine, whole)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """The row without raw moments and with what they say."""
        row = {name: value for name, value in means.items() if not name.startswith(HIDDEN)}
        if f"{HIDDEN}1.0" not in means:
            return row
        first, second, third, fourth = (
            [means[f"{HIDDEN}{power}.{channel}"] for channel in range(self.z_dim)]
            for power in range(1, 5)
        )
        stds, kurtoses = [], []
        for m1, m2, m3, m4 in zip(first, second, third, fourth, strict=True):
            variance = max(m2 - m1**2, 0.0)
            central = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
            stds.append(math.sqrt(variance))
            kurtoses.append(central / variance**2 if variance > 0 else 0.0)
        dead = sum(std <= DEAD_STD * max(stds) for std in stds) / len(stds)
        row |= {
            "latent_std": sum(stds) / len(stds),
            "latent_std_min": min(stds),
            "latent_std_max": max(stds),
            "latent_mean_max": max(map(abs, first)),
            "latent_kurtosis_max": max(kurtoses),
            "latent_dead": dead,
        }
        for channel, (mean, std, kurtosis) in enumerate(zip(first, stds, kurtoses, strict=True)):
            name = f"latent_channel/{channel:02d}"
            row |= {f"{name}/mean": mean, f"{name}/std": std, f"{name}/kurtosis": kurtosis}
        return row


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
