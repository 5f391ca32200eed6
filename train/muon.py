"""AdamW that moves chosen matrices and kernels by orthogonal steps (Muon).

Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; its scale beside AdamW as in
Moonlight, arXiv 2502.16982 §2.2. Torch's own `torch.optim.Muon` multiplies in bf16 on every device,
which a CPU without that format does 17 times slower, and knows no matrices side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, tuned for speed
ITERATIONS = 5
MOMENTUM = 0.95
RMS = 0.2  # of a step of learning rate 1, about AdamW's


class MuonAdamW(torch.optim.AdamW):
    """Groups with `parts` > 0 are Muon's, their matrices so many blocks of rows; others AdamW's.
    Kernels of convolutions are matrices, too: a row for each channel that comes out.

    A Muon group's `lr_scale` multiplies its learning rate. Its second moments stay zero: state and
    checkpoints have one layout whichever way a parameter is moved.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One step; without a gradient a parameter stays as it is."""
        if closure is not None:
            raise ValueError("closures are not supported")
        every = self.param_groups
        for group in every:
            for parameter in group["params"] if group.get("parts") else ():
                if parameter.grad is not None:
                    self._turn(parameter, group)
        self.param_groups = [group for group in every if not group.get("parts")]
        try:
            super().step()
        finally:
            self.param_groups = every

    def _turn(self, parameter: Tensor, group: dict[str, Any]) -> None:
        momentum = self.state[parameter]["exp_avg"]
        momentum.lerp_(parameter.grad, 1 - MOMENTUM)
        ahead = parameter.grad.lerp(momentum, MOMENTUM)  # Nesterov's
        self.state[parameter]["step"] += 1
        lr = group["lr"] * group["lr_scale"]
        parameter.mul_(1 - lr * group["weight_decay"])
        for part, step in zip(
            parameter.chunk(group["parts"]), ahead.chunk(group["parts"]), strict=True
        ):
            matrix = step.flatten(1)  # (C', C · taps) of a kernel
            turned = orthogonal(matrix).view_as(step)
            part.add_(turned, alpha=-lr * RMS * max(matrix.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix whose singular values all are about 1 (0.7 to 1.2), by Newton-Schulz."""
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if is_tall else x).to(matrix.dtype)
