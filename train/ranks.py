"""The processes of a run: joining them, small agreements between them, and leaving."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from longtake.train.interfaces import listen_on_one

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


@dataclass(frozen=True)
class Ranks:
    """This process among `world_size`, and the device it computes on.

    `sequence_parallel` ranks in a row compute each sample together, a share of its tokens each: as
    one data-parallel rank, whose samples the first of them reads for all.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    group: Any = None  # that they talk through; None: the default one
    sequence_parallel: int = 1
    sequence_group: Any = None  # of those ranks in a row; None: this one is alone

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """This rank's place among the `num_data_ranks` that read samples of their own."""
        return self.rank // self.sequence_parallel

    @property
    def num_data_ranks(self) -> int:
        return self.world_size // self.sequence_parallel

    @property
    def is_reader(self) -> bool:
        """Whether this rank reads the samples of its sequence group."""
        return self.rank % self.sequence_parallel == 0

    def beside(self, timeout: timedelta | None = None) -> Ranks:
        """The same ranks on a group of their own, for another thread; all ranks together."""
        if self.world_size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=timeout))

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1), group=self.group)  # a CPU tensor: gloo on every device

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank; values travel as JSON."""
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = payload.numel()
        dist.all_reduce(sizes, group=self.group)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: payload.numel()] = payload
        texts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(texts, padded, group=self.group)
        return [
            json.loads(bytes(text[:size].numpy()))
            for text, size in zip(texts, sizes.tolist(), strict=True)
        ]

    def gather_data(self, value: Any) -> list[Any]:
        """One `value` of each data-parallel rank, the reader's; otherwise as `gather`."""
        return self.gather(value)[:: self.sequence_parallel]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank; it travels as JSON."""
        return self.gather(value if self.is_main else None)[0]

    def share(self, payload: bytes) -> bytes:
        """The reader's `payload` on all ranks of its sequence group."""
        if self.sequence_group is None:
            return payload
        size = torch.tensor([len(payload)])
        dist.broadcast(size, group=self.sequence_group, group_src=0)
        content = bytearray(payload if self.is_reader else int(size))
        view = torch.frombuffer(content, dtype=torch.uint8)
        dist.broadcast(view, group=self.sequence_group, group_src=0)
        return bytes(content)


def single_process(device: str | torch.device = "cpu") -> Ranks:
    """A run of one process, without any process group."""
    return Ranks(rank=0, world_size=1, local_rank=0, device=torch.device(device))


def init_distributed(
    device: str = "cpu", timeout: float = 1800.0, sequence_parallel: int = 1
) -> Ranks:
    """Joins the process group that torchrun's environment describes; alone without one.

    device: "cpu" (gloo), or "cuda" (nccl for its tensors, gloo beside it for small agreements).
    timeout: seconds after which a collective that not all ranks joined fails.
    sequence_parallel: ranks that compute each sample together; divides their number.
    Errors: ValueError for an unknown device, or for CUDA asked for and absent.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"train.device={device} must be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device=cuda, but torch sees no CUDA device: use train.device=cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    this_device = torch.device("cpu")
    if device == "cuda":
        this_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(this_device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return single_process(this_device)
    rank, limit = int(os.environ["RANK"]), timedelta(seconds=timeout)
    if not dist.is_initialized():
        held = listen_on_one(int(os.environ["MASTER_PORT"])) if rank == 0 else None
        dist.init_process_group(BACKENDS[device], rank=rank, world_size=world_size, timeout=limit)
        del held
    ranks = Ranks(rank, world_size, local_rank, this_device)
    if sequence_parallel == 1:
        return ranks
    group, _ = dist.new_subgroups(sequence_parallel, timeout=limit, backend=BACKENDS[device])
    return replace(ranks, sequence_parallel=sequence_parallel, sequence_group=group)


def join_alone(ranks: Ranks) -> None:
    """A process group of one, for libraries that want one all the same."""
    if not dist.is_initialized():
        backend = BACKENDS[ranks.device.type]
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def shutdown(exit_code: int | None = None) -> None:
    """Leaves the process group; with `exit_code`, ends the process as well.

    A clean end (0, or 75 after a preemption) waits for the other ranks first. The process then ends
    by `os._exit`: finished gloo processes were seen to abort in their destructors. After a failure
    (another code) nobody waits, since the other ranks may hang in a collective that this one never
    joined.
    """
    if dist.is_initialized():
        if exit_code in (None, 0, 75):
            dist.barrier()
        if exit_code is None:
            dist.destroy_process_group()
    if exit_code is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
