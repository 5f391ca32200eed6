"""Muon's turn of a VAE's kernels: rounds on their squares beside rounds on the whole kernels.

    python -m tests.bench.muon_kernels --base-dim 32 --rounds 10

All kernels of `vae=small` at a width; one thread, both in turn; prints the least CPU seconds of the
rounds, the ratio, and the largest difference of a value.
"""

import argparse
import math
import time
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from longtake.launch.compose import compose
from longtake.models.vae import VAE
from longtake.train import muon


def measure(kernels: list[Tensor], wide: float) -> tuple[float, list[Tensor]]:
    """CPU seconds to turn all kernels, and what they become."""
    with patch.object(muon, "WIDE", wide):
        start = time.process_time()
        turned = [muon.orthogonal(kernel) for kernel in kernels]
        return time.process_time() - start, turned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-dim", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run: Any = compose(["experiment=proof_vae", f"vae.base_dim={args.base_dim}"])
    vae = VAE(run.vae)
    kernels = [p.detach().flatten(1) for p in vae.parameters() if p.ndim > 1]
    sides = muon.WIDE, math.inf  # on squares, on the whole
    for wide in sides:
        measure(kernels, wide)
    found = [[measure(kernels, wide) for wide in sides] for _ in range(args.rounds)]
    squares, whole = (min(pair[side][0] for pair in found) for side in range(2))
    pairs = zip(*(turned for _, turned in found[0]), strict=True)
    distance = max((a - b).abs().max().item() for a, b in pairs)
    print(
        f"{len(kernels)} kernels at width {args.base_dim}: on squares {squares:.4f} s, on the "
        f"whole {whole:.4f} s, {whole / squares:.2f}x; largest difference {distance:.1e}"
    )


if __name__ == "__main__":
    main()
