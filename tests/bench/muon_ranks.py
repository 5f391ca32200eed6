"""A step of Muon whose matrices are divided between ranks, beside one that each rank makes alone.

    python -m tests.bench.muon_ranks --ranks 2 --width 512 --depth 4 --rounds 5

Blocks of a transformer: 4·width² of attention, 8·width² of MLP. On gloo, one thread a rank, both
in turn; prints the least of the rounds' seconds of the slowest rank, and the ratio.
"""

import argparse
import time
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from longtake.train.optim import build_adamw, create_state
from longtake.train.ranks import Ranks, single_process
from tests.train.forked import run_ranks
from tests.train.tiny import OPTIM


def blocks(width: int, depth: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    return nn.ModuleList(nn.Linear(*sizes, bias=False) for sizes in layers * depth)


def measure(ranks: Ranks, width: int, depth: int, rounds: int) -> list[list[float]]:
    """Seconds of this rank's steps: divided, alone."""
    seconds: list[list[float]] = [[], []]
    optimizers = []
    for sharing in (ranks, single_process()):
        module = blocks(width, depth)
        optimizer = build_adamw(module, replace(OPTIM, muon=["*"]), sharing)
        for parameter in module.parameters():
            create_state(optimizer, parameter)
            parameter.grad = torch.randn_like(parameter)
        optimizers.append(optimizer)
    for _ in range(rounds + 1):
        for optimizer, times in zip(optimizers, seconds, strict=True):
            dist.barrier()
            start = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - start)
    return [times[1:] for times in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("ranks", 2), ("width", 512), ("depth", 4), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    found = run_ranks(args.ranks, measure, args.width, args.depth, args.rounds)
    divided, alone = (
        min(max(times) for times in zip(*(mine[kind] for mine in found), strict=True))
        for kind in range(2)
    )
    print(
        f"width {args.width}, depth {args.depth}, {args.ranks} ranks: divided {divided:.3f} s, "
        f"alone {alone:.3f} s, ratio {alone / divided:.2f}"
    )


if __name__ == "__main__":
    main()
