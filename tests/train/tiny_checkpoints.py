"""Checkpoints of the tiny engine, to be read, damaged and killed."""

from pathlib import Path

from longtake.train.checkpoint import (
    Keep,
    save,
)
from longtake.train.ema import Ema, EmaConfig
from longtake.train.engine import Engine, Ranks, single_process
from tests.train import tiny

CONFIG = {"model": {"hidden_size": 13}}


def make(ranks: Ranks) -> tuple[Engine, Ema]:
    engine = tiny.build(ranks, "ddp")
    return engine, Ema(engine, EmaConfig(0.9))


def save_steps(folder: Path, steps: range, *, keep_last: int = 0) -> tuple[Engine, Ema]:
    """Trains one ddp rank and saves after each of `steps`."""
    engine, ema = make(single_process())
    for step in steps:
        tiny.train(engine, range(step, step + 1), ema=ema)
        state = {"step": step, "samples_seen": 11 * step}
        save(folder, step, engine, ema, state, CONFIG, keep=Keep(keep_last))
    return engine, ema


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def damage_flipped_byte(folder: Path) -> None:
    flip(folder / "rank-00000.safetensors", -100)
