"""A training step of the VAE against diffusers' AutoencoderKLWan: equal weights, equal input.

`python -m tests.bench.vae_step [--rounds N] [--bf16] [--compile] [--base-dim C]` from the
repository root. The size is that of Wan 2.1. A step is encode, decode, squared error + KL and the
backward pass. Both sides take turns in this process on one thread; figures are CPU time, medians
over rounds, and the distance between the two gradients as a share of their length. --compile adds
our side compiled.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from longtake.models.interop import vae_from_diffusers, vae_to_diffusers
from longtake.models.vae import VAE

WARM_UP = (1, 5, 32, 32)  # batch, frames, height, width
SHAPES = [WARM_UP, (1, 9, 64, 64), (2, 17, 64, 64)]


def main() -> None:
    """Print CPU seconds of a step on both sides, and their ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="both under autocast")
    parser.add_argument("--compile", action="store_true", help="a third side: ours, compiled")
    parser.add_argument("--base-dim", type=int, default=96)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    theirs: Any = AutoencoderKLWan(base_dim=args.base_dim)
    theirs.decoder.conv_out.weight.data.mul_(0.1)  # the peer clamps: pixels must lie inside
    ours, compiled = vae_from_diffusers(theirs), None
    if args.compile:
        compiled = vae_from_diffusers(theirs)
        compiled.compile_parts()
    for batch, *size in SHAPES:
        x = torch.rand(batch, 3, *size) * 2 - 1
        noise = torch.randn(batch, 16, *ours.config.latent_shape(*size))
        sides = {
            "Longtake": partial(step_ours, ours, x, noise),
            "diffusers": partial(step_theirs, theirs, x, noise),
        }
        if compiled is not None:
            sides["compiled"] = partial(step_ours, compiled, x, noise)
            with autocast(args.bf16):
                sides["compiled"]()  # compiles for this shape
        seconds = compare(sides, args.rounds, args.bf16)
        print(
            f"{batch}x{size[0]}x{size[1]}^2: "
            + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
            + f", ratio {seconds['diffusers'] / seconds['Longtake']:.2f}, "
            f"gradients differ by {distance(ours, theirs):.1e}"
            + " (to warm up)"
            * ((batch, *size) == WARM_UP),
            flush=True,
        )


def step_ours(vae: VAE, x: Tensor, noise: Tensor) -> None:
    """Gradients of one step in `vae.grad`."""
    vae.zero_grad()
    pixels, posterior = vae(x, noise)
    loss_of(pixels, x, posterior.kl()).backward()


def step_theirs(vae: Any, x: Tensor, noise: Tensor) -> None:
    """The same with the peer's module."""
    vae.zero_grad()
    posterior = vae.encode(x).latent_dist
    pixels = vae.decode(posterior.mean + posterior.std * noise).sample
    loss_of(pixels, x, posterior.kl()).backward()


def loss_of(pixels: Tensor, x: Tensor, kl: Tensor) -> Tensor:
    """Squared error and a little KL, in fp32."""
    return (pixels.float() - x).square().mean() + 1e-8 * kl.float().mean()


def compare(sides: dict[str, Callable[[], None]], rounds: int, bf16: bool) -> dict[str, float]:
    """Median CPU seconds of each side, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, step in sides.items():
            start = time.process_time()
            with autocast(bf16):
                step()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def autocast(bf16: bool) -> AbstractContextManager:
    """bf16 for linear layers and convolutions, or nothing."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)


def distance(ours: VAE, theirs: Any) -> float:
    """Length of the difference of the two sides' gradients, as a share of the peer's."""
    gradients = VAE(ours.config)
    for target, source in zip(gradients.parameters(), ours.parameters(), strict=True):
        assert source.grad is not None
        target.data = source.grad
    nothing = [0.0] * ours.config.z_dim
    found = vae_to_diffusers(gradients, latents_mean=nothing, latents_std=nothing).parameters()
    pairs = [(a.data, b.grad) for a, b in zip(found, theirs.parameters(), strict=True)]
    apart = sum((a - b).square().sum().item() for a, b in pairs)
    return math.sqrt(apart / sum(b.square().sum().item() for _, b in pairs))


if __name__ == "__main__":
    main()
