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
        # As torch's fused AdamW takes them from whoever clips: a divisor, and 1 to change nothing.
        scale: Tensor | None = getattr(self, "grad_scale", None)
        skip: Tensor | None = getattr(self, "found_inf", None)
        for group in every:
            for parameter in group["params"] if group.get("parts") else ():
                if parameter.grad is not None:
                    self._turn(parameter, group, scale, skip)
        self.param_groups = [group for group in every if not group.get("parts")]
        try:
            super().step()
        finally:
            self.param_groups = every

    def _turn(
        self,
        parameter: Tensor,
        group: dict[str, Any],
        scale: Tensor | None,
        skip: Tensor | None,
    ) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad if scale is None else parameter.grad / scale
        momentum = self.state[parameter]["exp_avg"]
        taken: Tensor | float = 1.0
        if skip is not None:
            taken = 1.0 - skip
            gradient = torch.where(skip.bool(), momentum, gradient)  # which leaves it where it is
        momentum.lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(momentum, MOMENTUM)  # Nesterov's
        self.state[parameter]["step"] += taken
        lr = group["lr"] * group["lr_scale"] * taken
        parameter.mul_(1 - lr * group["weight_decay"])
        for part, step in zip(
            parameter.chunk(group["parts"]), ahead.chunk(group["parts"]), strict=True
        ):
            matrix = step.flatten(1)  # (C', C · taps) of a kernel
            turned = orthogonal(matrix).view_as(step)
            part.sub_(turned * (lr * RMS * max(matrix.shape) ** 0.5))


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
