"""What a reconstruction is charged with, term by term, each (B,): a mean over the clip's values.

`error` is reconstruction − truth, float (B, 3, T, H, W), pixels in [-1, 1].
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from longtake.train.fidelity import load_torchscript

HAAR_LEVELS = 3
CHARBONNIER_EPS = 1e-3
LUMA = (0.299, 0.587, 0.114)


def absolute(error: Tensor) -> Tensor:
    """Mean absolute error."""
    return error.abs().flatten(1).mean(1)


def squared(error: Tensor) -> Tensor:
    """Mean squared error."""
    return error.square().flatten(1).mean(1)


def charbonnier(error: Tensor) -> Tensor:
    """√(error² + ε²) − ε: L1 that is smooth at zero (Charbonnier et al. 1994)."""
    eps = CHARBONNIER_EPS
    return (torch.sqrt(error.square() + eps**2) - eps).flatten(1).mean(1)


def detail(error: Tensor) -> Tensor:
    """Mean absolute Haar coefficient of the error's horizontal, vertical and diagonal bands.

    Over HAAR_LEVELS scales of every frame, or as many as its size allows (Haar wavelets, Mallat
    1989). Blur hides in a mean over pixels and stands out here: edges live in these bands, at every
    scale. The transform is linear, so bands of the error are errors of the bands.
    """
    total, levels = error.new_zeros(len(error)), 0
    smooth = error
    while levels < HAAR_LEVELS and min(smooth.shape[-2:]) >= 2:
        smooth, bands = haar(smooth)
        total, levels = total + bands.abs().flatten(1).mean(1), levels + 1
    return total / max(levels, 1)


def haar(x: Tensor) -> tuple[Tensor, Tensor]:
    """One step over (B, C, T, H, W): means (B, C, T, H/2, W/2) and the three bands (B, 3, C, ...).

    An odd last row or column is left to the other terms. Bands are orthonormal; the smooth part is
    the mean of four pixels, so that all scales are in units of pixels.
    """
    height, width = (size // 2 * 2 for size in x.shape[-2:])
    x = x[..., :height, :width]
    a, b = x[..., ::2, ::2], x[..., ::2, 1::2]
    c, d = x[..., 1::2, ::2], x[..., 1::2, 1::2]
    bands = torch.stack((a - b + c - d, a + b - c - d, a - b - c + d), dim=1) / 2
    return (a + b + c + d) / 4, bands


def chroma(error: Tensor) -> Tensor:
    """Mean squared error of colour alone: what is left of R, G and B when luma is taken away.

    Small differences of hue hardly show in a mean over channels, where light has most of the
    variance. Luma is that of ITU-R BT.601.
    """
    luma = torch.einsum("c,bcthw->bthw", error.new_tensor(LUMA), error)
    return squared(error - luma[:, None])


def flicker(error: Tensor) -> Tensor:
    """Mean absolute change of the error from frame to frame; 0 for images.

    A constant error is not seen as motion, a changing one flickers.
    """
    if error.shape[2] == 1:
        return error.new_zeros(len(error))
    return error.diff(dim=2).abs().flatten(1).mean(1)


class Perceptual:
    """LPIPS (arXiv 1801.03924) by a TorchScript file of the user's own; nothing is fetched.

    The file is called as the VGG-16 of the StyleGAN projectors is:
    `net(images, resize_images=False, return_lpips=True)` with images (N, 3, H, W) in [0, 255]
    returns features (N, D) whose squared distance is LPIPS. A TorchScript file is a program: give
    only one whose maker you trust.
    """

    def __init__(self, path: str, num_frames: int, device: torch.device | str) -> None:
        """At most `num_frames` evenly spaced frames of a clip are compared.

        ValueError for a missing file or one that is no such TorchScript.
        """
        key = "loss.perceptual.weights"
        self.num_frames = num_frames
        self.module = load_torchscript(Path(path), key, device)
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        arguments = {argument.name for argument in self.module.forward.schema.arguments}
        missing = {"resize_images", "return_lpips"} - arguments
        if missing:
            raise ValueError(f"{key} {path}: its forward has no {', '.join(sorted(missing))}")

    def __call__(self, pixels: Tensor, video: Tensor) -> Tensor:
        """Mean LPIPS of the frames of pixels and video (B, 3, T, H, W) in [-1, 1] → (B,)."""
        frames = video.shape[2]
        chosen = torch.linspace(0, frames - 1, min(frames, self.num_frames)).round().long()
        drawn, true = (self._features(clip[:, :, chosen]) for clip in (pixels, video))
        return (drawn - true).square().sum(-1).mean(1)

    def _features(self, clips: Tensor) -> Tensor:
        images = clips.transpose(1, 2).flatten(0, 1).float() * 127.5 + 127.5
        features = self.module(images, resize_images=False, return_lpips=True)
        return features.float().view(len(clips), clips.shape[2], -1)  # (B, K, D)
