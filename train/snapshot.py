"""The training state of a rank, copied to CPU memory: a checkpoint is written from it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch

from longtake.train.ema import Ema
from longtake.train.engine import Engine
from longtake.train.range_files import range_key
from longtake.train.strategy import StateRange
from longtake.train.tasks import Opponent

TRAIN_STATE, CONFIG = "train_state.json", "config.json"
ADVERSARY = "adversary."  # before the kinds of the second network's tensors


@dataclass(frozen=True)
class Snapshot:
    """What this rank writes, copied to the CPU: training may go on while it is written."""

    ranges: list[StateRange]
    aliases: dict[str, str]  # tied names -> the name that is stored
    optimizer_steps: int
    samples_seen: int | None
    texts: dict[str, bytes]  # small files by name


@torch.no_grad()
def take_snapshot(
    engine: Engine,
    ema: Ema | None,
    adversary: Opponent | None,
    train_state: dict[str, Any],
    config: dict[str, Any],
    *,
    memory_of: Snapshot | None = None,
) -> Snapshot:
    """Copies what this rank owns to CPU memory; the only part that training waits for.

    `memory_of` is a snapshot that nobody needs any more: fresh pages would cost more than the copy.
    """
    texts = {TRAIN_STATE: to_json(train_state), CONFIG: to_json(config)}
    owned = list(engine.owned_ranges())
    if adversary is not None:
        others = adversary.engine.owned_ranges()
        owned += [replace(piece, kind=ADVERSARY + piece.kind) for piece in others]
    if ema is not None:
        owned += list(ema.owned_ranges())
    free = {range_key(r): r.tensor for r in memory_of.ranges} if memory_of is not None else {}
    copies = [replace(r, tensor=copy_to_cpu(r.tensor, free.get(range_key(r)))) for r in owned]
    if engine.ranks.device.type == "cuda":
        torch.cuda.synchronize(engine.ranks.device)
    seen = train_state.get("samples_seen")
    return Snapshot(copies, engine.aliases, engine.optimizer_steps, seen, texts)


def copy_to_cpu(tensor: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
    """A copy in `memory`, or in new memory, page-locked for a GPU's tensors; it may still be on
    its way from there."""
    if memory is None or memory.shape != tensor.shape:
        memory = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return memory.copy_(tensor, non_blocking=True)


def to_json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()
