"""Where the time of a step goes, rank by rank, and how much the whole job gets through."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from longtake.train.ranks import Ranks

# Dense bf16 peak in FLOP/s of one GPU, from NVIDIA's data sheets (SXM boards, no sparsity).
PEAK_FLOPS = {"B200": 2.25e15, "H200": 9.89e14, "H100": 9.89e14, "A100": 3.12e14}


@dataclass
class Work:
    """What the whole job did in some steps."""

    samples: int = 0
    frames: int = 0
    tokens: int = 0
    flops: float = 0.0  # of the model, without recomputation; 0 where it is not known

    def add(self, other: Work) -> None:
        self.samples += other.samples
        self.frames += other.frames
        self.tokens += other.tokens
        self.flops += other.flops


class StepTimes:
    """Times between two log rows. Each rank has four: `data` it waited for, `others` it waited for
    in the agreement of the step, `own` work before the last backward, and the `rest`: that
    backward, the exchange of gradients and the optimizer, which all ranks leave together.
    """

    def __init__(self, ranks: Ranks, peak_flops: float) -> None:
        """`peak_flops` of one device; 0: what is known of a GPU of this name."""
        self.ranks = ranks
        self.peak_flops = peak_flops or known_peak(ranks.device)
        self.useful = 0.0  # seconds in steps but for waiting for data, since the first one
        self._work_clock = _Clock(ranks.device)
        self.start()

    def start(self) -> None:
        """Count from here on."""
        self._since = time.perf_counter()
        self._spent = {"paused": 0.0, "data": 0.0, "others": 0.0}
        self._steps = 0
        self._work = Work()

    def pausing(self) -> AbstractContextManager[None]:
        """Time spent in here (validation, samples, checkpoints) is not training."""
        return self._spending("paused")

    def waiting_for_data(self) -> AbstractContextManager[None]:
        return self._spending("data")

    def waiting_for_others(self) -> AbstractContextManager[None]:
        return self._spending("others")

    @contextmanager
    def _spending(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._spent[name] += time.perf_counter() - start

    @contextmanager
    def working(self) -> Iterator[None]:
        """Work that no rank beyond this one's sequence group has a part in."""
        with self._work_clock.running():
            yield

    def count(self, work: Work) -> None:
        """One optimizer step, all ranks together."""
        self._work.add(work)
        self._steps += 1

    def read(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """What belongs into the log row, and seconds per step by rank; all ranks together."""
        paused, data, others = self._spent.values()
        seconds = max(time.perf_counter() - self._since - paused, 1e-9)
        steps = max(self._steps, 1)
        own = self._work_clock.read()
        rest = seconds - data - others - own
        mine = [seconds, data, others, own, rest, host_memory(), self._gpu_memory()]
        columns = list(zip(*self.ranks.gather(mine), strict=True))
        by_rank = {
            name: [each / steps for each in column]
            for name, column in zip(
                ("step", "data", "others", "own", "rest"), columns, strict=False
            )
        }
        busy = [sum(both) for both in zip(by_rank["data"], by_rank["own"], strict=True)]
        self.useful += max(columns[0]) - max(columns[1])
        row = {
            "seconds_per_step": seconds / steps,
            "samples_per_second": self._work.samples / seconds,
            "frames_per_second": self._work.frames / seconds,
            "tokens_per_second": self._work.tokens / seconds,
            "data_wait": max(columns[1]) / seconds,
            "memory_gb": max(columns[5]),
        }
        if len(busy) > 1:
            row["rank_wait"] = sum(columns[2]) / len(busy) / seconds
            row["slowest_rank"] = float(busy.index(max(busy)))
            row["imbalance"] = max(busy) / (sum(busy) / len(busy))
        if self.ranks.device.type == "cuda":
            row["gpu_memory_gb"] = max(columns[6])
        if self.peak_flops and self._work.flops:
            row["mfu"] = self._work.flops / seconds / (self.peak_flops * len(busy))
        self.start()
        return row, by_rank

    def _gpu_memory(self) -> float:
        device = self.ranks.device
        return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


class _Clock:
    """Sums up stretches of work; those of a GPU in its own time, which costs no host sync."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        if self.is_cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            stop.record()
            self._events.append((start, stop))
        else:
            since = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - since

    def read(self) -> float:
        """Seconds since the last read."""
        for start, stop in self._events:
            stop.synchronize()
            self._seconds += start.elapsed_time(stop) / 1e3
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds


def known_peak(device: torch.device) -> float:
    """FLOP/s of a device that is in the table, else 0."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), 0.0)


def host_memory() -> float:
    """Largest resident size of this process so far, GB (10^9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
