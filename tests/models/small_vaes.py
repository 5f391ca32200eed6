"""Small VAEs of both generations with weights that hide nothing, and clips for them."""

import torch
from torch import Tensor, nn

from longtake.models.vae import VAE
from longtake.models.vae_config import VAEConfig

CONFIGS = {
    "tiny 2x2x2": VAEConfig(8, 4, (1, 2), (True,), 1),
    "4x4x4": VAEConfig(6, 3, (1, 2, 3), (True, True), 1, decoder_base_dim=10),
    "residual 2x4x4": VAEConfig(6, 5, (1, 2, 2), (False, True), 1, residual=True),
    "residual 4x8x8": VAEConfig(
        6, 3, (1, 2, 2), (True, True), 1, decoder_base_dim=8, residual=True, patch_size=2
    ),
}
TINY = CONFIGS["tiny 2x2x2"]


def make_vae(config: VAEConfig) -> VAE:
    torch.manual_seed(0)
    vae = VAE(config)
    randomise(vae)
    return vae


def randomise(module: nn.Module) -> None:
    """Give every parameter, norms and biases too, a value of its own."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 4
        parameter.data = parameter.data.mean() * 0.5 + noise * (1.5 / fan_in**0.5)


def video(frames: int, height: int, width: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1
