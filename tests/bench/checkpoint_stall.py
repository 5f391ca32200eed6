"""How long training waits for a checkpoint: written in the background, and blocking.

    python -m tests.bench.checkpoint_stall --parameters 20 --rounds 5

Parameters count millions. Prints medians and their ratio; the files lie in --folder.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from longtake.train.checkpoint import Keep, save
from longtake.train.checkpoint_writer import BackgroundWriter
from longtake.train.ema import Ema, EmaConfig
from longtake.train.engine import Engine, EngineConfig, single_process
from longtake.train.runs import pick_device
from tests.train.tiny import OPTIM

WIDTH = 1024


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    ranks = single_process(pick_device(args.device))
    layers = max(1, round(args.parameters * 1e6 / WIDTH**2))
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    engine = Engine(module, OPTIM, EngineConfig("ddp", 0, "fp32", "none"), ranks)
    ema = Ema(engine, EmaConfig(0.9))
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    writer = BackgroundWriter(folder / "background", ranks, Keep(1, 0))
    other = folder / "blocking"
    stalls, blocking = [], []
    try:
        for step in range(1, args.rounds + 2):
            stalls.append(seconds(partial(writer.start, step, engine, ema, None, {}, {})))
            writer.finish()
            blocking.append(
                seconds(lambda n=step: save(other, n, engine, ema, {}, {}, keep=Keep(1)))
            )
    finally:
        writer.close()
        shutil.rmtree(folder)
    stall, blocked = statistics.median(stalls[1:]), statistics.median(blocking[1:])
    size = layers * WIDTH**2 * 16 / 1e9
    print(
        f"{size:.2f} GB of state on {ranks.device}: stall {stall:.3f} s (first {stalls[0]:.3f}), "
        f"blocking {blocked:.3f} s, ratio {blocked / stall:.1f}"
    )


if __name__ == "__main__":
    main()
