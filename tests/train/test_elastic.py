"""A run that is killed and goes on with other numbers of ranks and workers sees the same data."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from longtake.data.catalogue import load_catalogue
from longtake.train.run_folder import read_marker
from tests.train.forked import free_port, run_rank
from tests.train.tiny_runs import losses, options, train_here, train_on_rank, write_splits

STEPS = 20
# (ranks, workers of each, the step whose row in the log ends it by SIGKILL)
PHASES = ((1, 0, 6), (2, 2, 11), (4, 1, 16))


def damage(shards: Path, key_number: int) -> None:
    """Flip a byte of one clip after indexing."""
    catalogue = load_catalogue(shards)
    row = catalogue.table.to_pylist()[key_number]
    path = Path(catalogue.root) / row["shard"]
    data = bytearray(path.read_bytes())
    data[row["payload_offset"] + row["payload_size"] // 2] ^= 0x55
    path.write_bytes(data)


def train_until_killed(overrides: list[str], folder: Path, ranks: int, step: int, out: Path) -> int:
    """Start forked ranks and SIGKILL them all once the log holds `step`; the last logged step."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    processes = [
        context.Process(
            target=run_rank, args=(rank, ranks, port, str(out), train_on_rank, (overrides,))
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 200
    try:
        while max(logged(folder), default=0) < step:
            assert time.monotonic() < deadline, "the run does not get on"
            assert all(process.is_alive() for process in processes), "the run ended by itself"
            time.sleep(0.01)
    finally:
        for process in processes:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
    return max(logged(folder))


def logged(folder: Path) -> dict[int, float]:
    return losses(folder, "data_hash") if (folder / "metrics.jsonl").exists() else {}


@pytest.mark.dist
def test_global_batches_are_equal_over_1_2_4_1_ranks_with_kills_between(tmp_path: Path) -> None:
    write_splits(tmp_path, 40, 8)
    damage(tmp_path / "train", 13)
    more = (f"train.steps={STEPS}", "train.checkpoint_every=3", "data.crop=random")
    whole, elastic = tmp_path / "whole", tmp_path / "elastic"
    assert train_here(options(tmp_path, whole, *more)) == 0
    assert (whole / "quarantine.jsonl").read_text().count("changed after indexing") == 1

    for ranks, workers, step in PHASES:
        command = options(tmp_path, elastic, *more, f"data.num_workers={workers}")
        assert train_until_killed(command, elastic, ranks, step, tmp_path) < STEPS
    assert train_here(options(tmp_path, elastic, *more, "data.num_workers=3")) == 0
    assert read_marker(elastic) == "FINISHED"

    expected, found = losses(whole, "data_hash"), losses(elastic, "data_hash")
    assert len(set(expected.values())) == STEPS and found == expected
    assert (elastic / "quarantine.jsonl").read_text() == (whole / "quarantine.jsonl").read_text()
    one, other = losses(whole), losses(elastic)
    assert one.keys() == other.keys()
    # Sums over ranks come in another order; bf16 autocast makes that visible in weights.
    np.testing.assert_allclose(list(other.values()), list(one.values()), rtol=2e-3)
