"""What the engine costs in one process: its step beside a plain loop's, strategy by strategy.

`python -m tests.bench.engine_step [--rounds N] [--bf16] [--strategies …]` from the repository root.
A step is a DiT of 20.4 M parameters on 1536 tokens: forward, backward, clipping, fused AdamW. All
sides take turns in this process on one thread; figures are CPU time, the least of all rounds, for
what other processes add to it is no cost of ours.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from longtake.models.dit import DiT, DiTConfig
from longtake.train.engine import Engine, EngineConfig, single_process
from longtake.train.optim import OptimConfig, build_adamw

CONFIG = DiTConfig(
    in_channels=16,
    out_channels=16,
    hidden_size=384,
    num_heads=6,
    depth=8,
    ffn_dim=1536,
    patch_size=(1, 2, 2),
    text_dim=384,
    freq_dim=256,
    cross_attn_norm=True,
    eps=1e-6,
)
LATENTS, TEXT = (1, 16, 6, 32, 32), (1, 32, 384)  # 6 · 16 · 16 = 1536 tokens
OPTIM = OptimConfig(1e-4, (0.9, 0.95), 1e-8, 0.1, 0, "constant", 0.1, 1.0, [], 1.0)
STRATEGIES = {
    "ddp": ("ddp", 0),
    "fsdp2": ("fsdp2", 0),
    **{f"zero{stage}": ("deepspeed", stage) for stage in range(4)},
}


def main() -> None:
    """Print CPU seconds of a step on every side, and their ratio to the plain loop's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    precision = "bf16" if args.bf16 else "fp32"
    sides = {"plain loop": plain_loop(args.bf16)}
    for name in args.strategies:
        sides[name] = with_engine(EngineConfig(*STRATEGIES[name], precision, "none"))
    seconds = take_turns(sides, args.rounds)
    for name, value in seconds.items():
        share = value / seconds["plain loop"]
        print(f"{name:10s} {value:.3f} s  {share:.3f}x", flush=True)


def new_model() -> DiT:
    torch.manual_seed(0)
    return DiT(CONFIG)


def loss_of(dit: Callable[..., torch.Tensor]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(LATENTS, generator=generator)
    text = torch.randn(TEXT, generator=generator)
    return (dit(latents, torch.full((1,), 0.5), text).float() - latents).square().mean()


def plain_loop(bf16: bool) -> Callable[[], None]:
    """A step as anyone writes it."""
    dit = new_model()
    adamw = build_adamw(dit, OPTIM)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(dit)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), OPTIM.max_grad_norm).item()
        adamw.step()
        adamw.zero_grad()

    return step


def with_engine(config: EngineConfig) -> Callable[[], None]:
    return partial(engine_step, Engine(new_model(), OPTIM, config, single_process()))


def engine_step(engine: Engine) -> None:
    engine.backward(loss_of(engine), last=True)
    engine.clip_and_step(OPTIM.lr, OPTIM.max_grad_norm)


def take_turns(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The least CPU seconds of each side, after one step to warm up."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, step in sides.items():
            start = time.process_time()
            step()
            if turn:
                spent[name].append(time.process_time() - start)
    return {name: min(values) for name, values in spent.items()}


if __name__ == "__main__":
    main()
