"""What any strategy wrote on any number of ranks, every strategy on any other number reads."""

from pathlib import Path
from typing import Any

import pytest

from longtake.train.checkpoint import load_into, save
from longtake.train.ema import Ema
from longtake.train.engine import Engine, Ranks
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
    return engine, Ema(engine, 0.9)


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
        results = run_ranks(readers, read_all, str(tmp_path), PAIRS, 5)[0]
        check(written, PAIRS, results)
