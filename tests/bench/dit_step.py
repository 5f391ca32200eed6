"""A training step of the DiT against diffusers' WanTransformer3DModel: equal weights and inputs.

`python -m tests.bench.dit_step [--rounds N] [--bf16] [--compile] [--words L]` from the repository
root. 20.5 M parameters, 1536 tokens in one sample, text padded to 512 tokens; a step is forward,
squared error, backward and AdamW. First with a timestep per sample, then with K = 2 levels, which
the peer takes as a timestep per token. All sides take turns in this process on one thread; figures
are CPU time, medians over rounds, and the distance between the gradients as a share of their
length. "tuned" is the peer at its best: fused AdamW, and with --compile its blocks compiled. Then
our blocks are compiled, too.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from longtake.models.dit import DiT
from longtake.models.interop import dit_from_diffusers, dit_state_from_diffusers
from longtake.train.heap import keep_freed_memory

SIZES: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 6, "attention_head_dim": 64,
    "in_channels": 16, "out_channels": 16, "text_dim": 512, "freq_dim": 256, "ffn_dim": 1536,
    "num_layers": 8,
}  # fmt: skip
LATENTS = (1, 16, 6, 32, 32)
MAX_TEXT = 512


@dataclass
class Inputs:
    """What both sides see; `index` (B, N) says which of two levels a token has, None: all t."""

    latents: Tensor
    target: Tensor
    text: Tensor
    lens: Tensor
    t: Tensor
    index: Tensor | None


def main() -> None:
    """Print CPU seconds of a step of every side, and the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="ours and the tuned peer in autocast")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--words", type=int, default=64, help="text tokens that are no padding")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as in every training on a CPU; all sides gain
    torch.manual_seed(0)
    theirs, tuned = WanTransformer3DModel(**SIZES), WanTransformer3DModel(**SIZES)
    tuned.load_state_dict(theirs.state_dict())
    ours = dit_from_diffusers(theirs)
    if args.compile:
        tuned.compile_repeated_blocks()
        ours.compile_blocks()
    count = sum(p.numel() for p in ours.parameters())
    for name, inputs in (("t", draw(args.words, False)), ("K=2", draw(args.words, True))):
        check = distance(ours, theirs, inputs)
        sides = {
            "Longtake": side(ours, partial(predict_ours, ours, inputs), inputs, True, args.bf16),
            "diffusers": side(
                theirs, partial(predict_theirs, theirs, inputs), inputs, False, False
            ),
            "tuned": side(tuned, partial(predict_theirs, tuned, inputs), inputs, True, args.bf16),
        }
        seconds = compare(sides, args.rounds)
        print(
            f"{count / 1e6:.1f} M parameters, {name}: "
            + ", ".join(f"{side} {value:.2f} s" for side, value in seconds.items())
            + f", ratio {seconds['diffusers'] / seconds['Longtake']:.2f}"
            + f" (tuned {seconds['tuned'] / seconds['Longtake']:.2f})"
            + f", gradients differ by {check:.1e}",
            flush=True,
        )


def draw(words: int, by_token: bool) -> Inputs:
    """Random latents, text with zero padding, and levels per token where asked for."""
    latents, target = torch.randn(2, *LATENTS).unbind()
    text = torch.randn(1, MAX_TEXT, SIZES["text_dim"])
    text[:, words:] = 0
    tokens = math.prod(LATENTS[2:]) // math.prod(SIZES["patch_size"])
    index = (torch.arange(tokens)[None] < tokens // LATENTS[2]).long() if by_token else None
    return Inputs(latents, target, text, torch.tensor([words]), torch.tensor([0.6]), index)


def predict_ours(dit: DiT, inputs: Inputs) -> Tensor:
    """Our forward pass; what is given has level 0."""
    levels = None if inputs.index is None else torch.stack((inputs.t, 0 * inputs.t), 1)
    return dit(
        inputs.latents, inputs.t, inputs.text, inputs.lens, levels=levels, level_index=inputs.index
    )


def predict_theirs(module: Any, inputs: Inputs) -> Tensor:
    """The peer's forward pass."""
    t = inputs.t
    if inputs.index is not None:
        t = torch.where(inputs.index == 0, t[:, None], 0.0)
    return module(inputs.latents, 1000 * t, inputs.text, return_dict=False)[0]


def side(
    module: Any, predict: Callable[[], Tensor], inputs: Inputs, fused: bool, bf16: bool
) -> Callable[[], None]:
    """One training step; `fused` is torch's fused AdamW."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=fused)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            output = predict()
        (output.float() - inputs.target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each side, in turns, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, step in sides.items():
            start = time.process_time()
            step()
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def distance(ours: DiT, theirs: Any, inputs: Inputs) -> float:
    """Length of the difference of the two sides' gradients at the peer's weights, as a share."""
    ours.load_state_dict(dit_state_from_diffusers(theirs.state_dict(), ours))
    for output in (predict_ours(ours, inputs), predict_theirs(theirs, inputs)):
        (output - inputs.target).square().mean().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    wanted = dit_state_from_diffusers(grads, ours)
    pairs = [(p.grad, wanted[name]) for name, p in ours.named_parameters() if p.grad is not None]
    apart = sum((a - b).square().sum().item() for a, b in pairs)
    share = math.sqrt(apart / sum(b.square().sum().item() for _, b in pairs))
    ours.zero_grad()
    theirs.zero_grad()
    return share


if __name__ == "__main__":
    main()
