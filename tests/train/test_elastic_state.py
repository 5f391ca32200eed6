"""What any strategy wrote on any number of ranks, every strategy on any other number reads."""

import ctypes
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from longtake.train.checkpoint import load_into, save
from longtake.train.ema import Ema, EmaConfig
from longtake.train.engine import Engine, EngineConfig, Ranks
from tests.train import tiny
from tests.train.forked import import_before_fork, run_ranks

STRATEGIES = {
    "ddp": ("ddp", 0),
    "zero1": ("deepspeed", 1),
    "zero2": ("deepspeed", 2),
    "zero3": ("deepspeed", 3),
    "fsdp2": ("fsdp2", 0),
}
SAVED_AT = 3  # steps before the checkpoint


@pytest.fixture(scope="module", autouse=True)
def slow_imports() -> None:
    import_before_fork()


def make(ranks: Ranks, name: str) -> tuple[Engine, Ema]:
    engine = tiny.build(ranks, *STRATEGIES[name])
    return engine, Ema(engine, EmaConfig(0.9))


def write_all(ranks: Ranks, folder: str, steps: int) -> dict[str, Any]:
    """Each strategy's checkpoint in a folder of its own; the state in it, the losses after it."""
    written = {}
    for name in STRATEGIES:
        engine, ema = make(ranks, name)
        tiny.train(engine, range(SAVED_AT), ema=ema)
        save(Path(folder, name), SAVED_AT, engine, ema, {"step": SAVED_AT}, {})
        state = tiny.full_state(engine, ema)
        written[name] = [state, tiny.train(engine, range(SAVED_AT, SAVED_AT + steps), ema=ema)]
    return written


def read_all(ranks: Ranks, folder: str, pairs: list[tuple[str, str]], steps: int) -> list[Any]:
    """For (writer, reader): state after loading, optimizer steps, the losses that follow.

    One engine per reader reads checkpoint after checkpoint: what it held before must not matter.
    """
    readers = {name: make(ranks, name) for name in dict.fromkeys(reader for _, reader in pairs)}
    results = []
    for writer, reader in pairs:
        engine, ema = readers[reader]
        load_into(Path(folder, writer, f"step-{SAVED_AT:08d}"), engine, ema)
        state, taken = tiny.full_state(engine, ema), engine.optimizer_steps
        losses = tiny.train(engine, range(SAVED_AT, SAVED_AT + steps), ema=ema)
        results.append([state, taken, losses])
    return results


def check(written: dict[str, Any], pairs: list[tuple[str, str]], results: list[Any]) -> None:
    for (writer, reader), (state, taken, losses) in zip(pairs, results, strict=True):
        expected, history = written[writer]
        assert state == expected, f"{writer} -> {reader}: every bit of parameters, moments, mean"
        assert taken == SAVED_AT
        for got, wanted in zip(losses, history, strict=True):
            assert got == pytest.approx(wanted, rel=1e-5), f"{writer} -> {reader}"


PAIRS = [(writer, reader) for writer in STRATEGIES for reader in STRATEGIES]


@pytest.mark.dist
@pytest.mark.parametrize(("writers", "readers", "pairs"), [(1, 2, PAIRS[::2]), (2, 1, PAIRS[1::2])])
def test_every_strategy_reads_every_other(
    tmp_path: Path, writers: int, readers: int, pairs: list[tuple[str, str]]
) -> None:
    written = run_ranks(writers, write_all, str(tmp_path), 2)[0]
    check(written, pairs, run_ranks(readers, read_all, str(tmp_path), pairs, 2)[0])


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("writers", [1, 2])
def test_every_strategy_reads_every_other_on_any_ranks(tmp_path: Path, writers: int) -> None:
    written = run_ranks(writers, write_all, str(tmp_path), 5)[0]
    for readers in (1, 2, 4):
        results = run_ranks(readers, read_all, str(tmp_path), PAIRS, 5, timeout=1200)[0]
        check(written, PAIRS, results)


WIDTH = 1024
TENSOR = 4 * WIDTH**2  # bytes


def large(ranks: Ranks, name: str) -> tuple[Engine, Ema]:
    """An engine with 12 matrices of 4 MiB that has taken a step: all its memory is there."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(12)))
    engine = Engine(module, tiny.OPTIM, EngineConfig(*STRATEGIES[name], "fp32", "none"), ranks)
    engine.backward(engine(torch.ones(1, WIDTH)).sum(), last=True)
    engine.clip_and_step(1e-3, 0.0)
    return engine, Ema(engine, EmaConfig(0.9))


def anonymous_memory() -> int:
    """Bytes of this process that are no mapped files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", status)[0])


def load_watched(ranks: Ranks, folder: str, name: str, writes: bool) -> int:
    """Bytes that loading needs for a while on top of what the engine holds."""
    engine, ema = large(ranks, name)
    if writes:
        save(Path(folder), 1, engine, ema, {}, {})
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not hide what is taken
    before, peak, done = anonymous_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(2e-4):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    load_into(Path(folder, "step-00000001"), engine, ema)
    done.set()
    watcher.join()
    return peak - before


@pytest.mark.slow
@pytest.mark.dist
def test_loading_holds_one_tensor_beside_the_state(tmp_path: Path) -> None:
    """Parameters, moments and mean are 192 MiB, of which each of two ranks holds half or all.

    Where parameters are replicated they are sent around after loading, in buffers of a fixed size.
    """
    for index, name in enumerate(STRATEGIES):
        peaks = run_ranks(2, load_watched, str(tmp_path), name, index == 0)
        print(f"{name}: " + ", ".join(f"{peak / 2**20:.1f} MiB" for peak in peaks))
        is_sharded = name in ("zero3", "fsdp2")
        assert 0 < max(peaks) < (1.5 * TENSOR if is_sharded else 30 * TENSOR), name
