"""A module with every kind of parameter that a strategy may stumble over, and its training."""

from typing import Any

import torch
from torch import nn

from longtake.train.ema import Ema
from longtake.train.engine import Engine, EngineConfig, Ranks
from longtake.train.optim import OptimConfig

OPTIM = OptimConfig(
    lr=1e-2,
    betas=(0.9, 0.95),
    eps=1e-8,
    weight_decay=0.1,
    warmup_steps=0,
    schedule="constant",
    min_lr_ratio=0.1,
    max_grad_norm=0.5,
    muon=[],
    muon_lr_scale=2.5,
)
NUM_SLOTS = 4
SLOT_SIZES = (3, 1, 5, 2)  # samples per micro-batch: unequal on purpose


class Tiny(nn.Module):
    """x (B, 7) -> (B, 5). Odd sizes, blocks, a tied, a frozen and an unused parameter, a buffer."""

    counter: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 13)
        self.blocks = nn.ModuleList(nn.Linear(13, 13) for _ in range(2))
        self.norm = nn.LayerNorm(13)
        self.second = nn.Linear(13, 5)
        self.tied = nn.Linear(13, 5)
        self.tied.weight = self.second.weight
        self.scale = nn.Parameter(torch.ones(3))
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Parameter(torch.full((11,), 0.1), requires_grad=False)
        self.register_buffer("counter", torch.arange(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)  # (B, 13)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        hidden = torch.tanh(self.norm(hidden))
        out = self.second(hidden) + 0.5 * self.tied(hidden)  # (B, 5)
        return out * self.scale.sum() + self.frozen.sum()


def build(
    ranks: Ranks,
    strategy: str,
    stage: int = 0,
    precision: str = "fp32",
    offload: str = "none",
    offload_path: str | None = None,
) -> Engine:
    torch.manual_seed(0)
    config = EngineConfig(strategy, stage, precision, offload, offload_path)
    return Engine(Tiny(), OPTIM, config, ranks)


def slot(step: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + index)
    size = SLOT_SIZES[index]
    x = torch.randn(size, 7, generator=generator)
    return x, torch.randn(size, 5, generator=generator)


def slot_loss(engine: Any, step: int, indices: range) -> torch.Tensor:
    """Summed squared error of some slots, over the number of samples of the global step."""
    pairs = [slot(step, index) for index in indices]
    x, y = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
    return ((engine(x).float() - y) ** 2).sum() / sum(SLOT_SIZES)


def train(
    engine: Engine,
    steps: range,
    *,
    ema: Ema | None = None,
    slots_at_once: int = 1,
    lr: float = OPTIM.lr,
) -> list[list[float]]:
    """[loss of the global step, grad norm] of each step."""
    ranks = engine.ranks
    share = NUM_SLOTS // ranks.world_size
    mine = range(ranks.rank * share, (ranks.rank + 1) * share, slots_at_once)
    history = []
    for step in steps:
        total = 0.0
        for start in mine:
            loss = slot_loss(engine, step, range(start, start + slots_at_once))
            engine.backward(loss, last=start == mine[-1])
            total += loss.item()
        result = engine.clip_and_step(lr, OPTIM.max_grad_norm)
        assert not result.skipped
        if ema is not None:
            ema.update(step + 1)
        history.append([sum(ranks.gather(total)), result.grad_norm])
    return history


def full_state(engine: Engine, ema: Ema | None = None) -> dict[str, list[float]]:
    """Every tensor of the training state, assembled from all ranks; each element exactly once."""
    owned = list(engine.owned_ranges()) + (list(ema.owned_ranges()) if ema else [])
    mine = [[f"{r.kind} {r.name}", r.start, r.shape, r.tensor.double().tolist()] for r in owned]
    pieces: dict[str, list[Any]] = {}
    shapes: dict[str, torch.Size] = {}
    for report in engine.ranks.gather(mine):
        for key, start, shape, values in report:
            pieces.setdefault(key, []).append((start, values))
            shapes[key] = torch.Size(shape)
    state = {}
    for key, parts in pieces.items():
        values: list[float] = []
        for start, part in sorted(parts):
            assert start == len(values), f"{key} has a gap or an overlap at {start}"
            values += part
        assert len(values) == shapes[key].numel(), key
        state[key] = values
    return state


def worst_difference(left: dict[str, list[float]], right: dict[str, list[float]]) -> float:
    assert left.keys() == right.keys(), sorted(left.keys() ^ right.keys())
    return max(abs(a - b) for key in left for a, b in zip(left[key], right[key], strict=True))
