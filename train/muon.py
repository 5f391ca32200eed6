"""AdamW that moves chosen matrices and kernels by orthogonal steps (Muon).

Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; its scale beside AdamW as in
Moonlight, arXiv 2502.16982 §2.2. Torch's own `torch.optim.Muon` multiplies in bf16 on every device,
which a CPU without that format does 17 times slower, and knows no matrices side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longtake.train.ranks import Ranks

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, tuned for speed
ITERATIONS = 5
MOMENTUM = 0.95
RMS = 0.2  # of a step of learning rate 1, about AdamW's
WIDE = 4  # times its height: a matrix wider than that costs less in rounds on its square


class MuonAdamW(torch.optim.AdamW):
    """Groups with `parts` > 0 are Muon's, their matrices so many blocks of rows; others AdamW's.
    Kernels of convolutions are matrices, too: a row for each channel that comes out.

    A Muon group's `lr_scale` multiplies its learning rate. Its second moments stay zero: state and
    checkpoints have one layout whichever way a parameter is moved.

    `ranks` hold the same parameters and gradients, and step together: each turns its share of the
    matrices for all, in a buffer as large as all of them.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], ranks: Ranks, **options: Any) -> None:
        super().__init__(groups, **options)
        self.ranks = ranks

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One step; without a gradient a parameter stays as it is."""
        if closure is not None:
            raise ValueError("closures are not supported")
        every = self.param_groups
        self._turn([group for group in every if group.get("parts")])
        self.param_groups = [group for group in every if not group.get("parts")]
        try:
            super().step()
        finally:
            self.param_groups = every

    def _turn(self, groups: Iterable[dict[str, Any]]) -> None:
        # As torch's fused AdamW takes them from whoever clips: a divisor, and 1 to change nothing.
        scale: Tensor | None = getattr(self, "grad_scale", None)
        skip: Tensor | None = getattr(self, "found_inf", None)
        taken = 1.0 if skip is None else 1.0 - skip
        moves: list[tuple[Tensor, Tensor, Tensor | float]] = []
        for group in groups:
            lr = group["lr"] * group["lr_scale"] * taken
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad if scale is None else parameter.grad / scale
                momentum = self.state[parameter]["exp_avg"]
                if skip is not None:
                    gradient = torch.where(skip.bool(), momentum, gradient)  # stays where it is
                momentum.lerp_(gradient, 1 - MOMENTUM)
                ahead = gradient.lerp(momentum, MOMENTUM)  # Nesterov's
                self.state[parameter]["step"] += taken
                parameter.mul_(1 - lr * group["weight_decay"])
                parts = (tensor.chunk(group["parts"]) for tensor in (parameter, ahead))
                # a kernel's matrix is (C', C · taps)
                moves += [(part, step.flatten(1), lr) for part, step in zip(*parts, strict=True)]
        turned = orthogonal_over(self.ranks, [matrix for _, matrix, _ in moves])
        for (part, _, lr), matrix in zip(moves, turned, strict=True):
            part.sub_(matrix.view_as(part) * (lr * RMS * max(matrix.shape) ** 0.5))


def orthogonal_over(ranks: Ranks, matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonal` of each matrix, which all ranks have; each rank does about the same work.

    The same bits at any number of ranks: one works a matrix out, and the others add zeros to it.
    """
    if ranks.world_size == 1 or not matrices:
        return [orthogonal(matrix) for matrix in matrices]
    flat = matrices[0].new_zeros(sum(matrix.numel() for matrix in matrices))
    pieces = flat.split([matrix.numel() for matrix in matrices])
    turned = [piece.view_as(matrix) for piece, matrix in zip(pieces, matrices, strict=True)]
    work = [0] * ranks.world_size
    cost = [matrix.numel() * min(matrix.shape) for matrix in matrices]
    for i in sorted(range(len(matrices)), key=lambda i: -cost[i]):  # largest first, to whom is idle
        rank = work.index(min(work))
        work[rank] += cost[i]
        if rank == ranks.rank:
            turned[i].copy_(orthogonal(matrices[i]))
    dist.all_reduce(flat)
    return turned


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix whose singular values all are about 1 (0.7 to 1.2), by Newton-Schulz.

    A round takes X to p(XXᵀ)·X. All p(XXᵀ) commute, so kernels, which are far wider than high, are
    multiplied by their product at the end; fp32 alone resolves the squares well enough for that.
    """
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    if x.dtype == torch.float32 and x.shape[1] > WIDE * x.shape[0]:
        square, product = x @ x.T, torch.eye(len(x), device=x.device)
        for _ in range(ITERATIONS):
            factor = b * square + c * square @ square
            factor.diagonal().add_(a)
            square, product = factor @ square @ factor, factor @ product
        x = product @ x
    else:
        for _ in range(ITERATIONS):
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
    return (x.T if is_tall else x).to(matrix.dtype)
