"""A step that hangs ends the run, with the stacks of every rank and of the loader in its folder."""

import json
import threading
from pathlib import Path
from typing import NoReturn

import pytest

from longtake.data.reader import SampleReader
from longtake.train.ranks import Ranks
from longtake.train.run_folder import read_marker
from longtake.train.trainer import Agreed, Training
from tests.train.forked import run_ranks
from tests.train.tiny_runs import options, train_on_rank

WATCHED = "train.hang_factor=3", "train.hang_seconds=3", "train.checkpoint_every=0"


def hang_for_ever() -> NoReturn:
    threading.Event().wait()
    raise AssertionError


def hang_collective(ranks: Ranks, overrides: list[str]) -> int:
    """Rank 1 does not come to the agreement of step 7."""
    agree = Training.agree

    def missing(self: Training, batches: list) -> Agreed:
        if self.step == 7 and self.ranks.rank == 1:
            hang_for_ever()
        return agree(self, batches)

    Training.agree = missing  # type: ignore[method-assign]
    return train_on_rank(ranks, overrides)


def hang_decoder(ranks: Ranks, overrides: list[str]) -> int:
    """The worker's 60th clip never comes."""
    read, count = SampleReader.read, iter(range(10**6))

    def stuck(self: SampleReader, sample: object) -> object:
        if next(count) == 60:
            hang_for_ever()
        return read(self, sample)  # type: ignore[arg-type]

    SampleReader.read = stuck  # type: ignore[method-assign, assignment]
    return train_on_rank(ranks, overrides)


def reports_of(folder: Path) -> list[str]:
    assert read_marker(folder) == "FAILED"
    assert "the stacks of all ranks" in json.loads((folder / "FAILED").read_text())["error"]
    return [p.read_text() for p in sorted((folder / "hangs" / "attempt-0001").glob("rank-*.txt"))]


@pytest.mark.dist
def test_a_collective_that_one_rank_misses(shards: Path) -> None:
    folder = shards / "collective"
    with pytest.raises(AssertionError, match=r"exit codes \[1, 1\]"):
        run_ranks(2, hang_collective, options(shards, folder, *WATCHED))
    waiting, missing = reports_of(folder)
    assert "step 7 has taken" in waiting and " in gather" in waiting and "no workers" in waiting
    assert " in hang_for_ever" in missing and " in hang_for_ever" not in waiting


@pytest.mark.dist
def test_a_decoder_that_never_returns(shards: Path) -> None:
    folder = shards / "decoder"
    command = options(shards, folder, *WATCHED, "data.num_workers=1")
    with pytest.raises(AssertionError, match=r"exit codes \[1\]"):
        run_ranks(1, hang_decoder, command)
    (report,) = reports_of(folder)
    stacks, loader = report.split("Loader: ")
    assert " in hang_for_ever" not in stacks and " in take" in stacks
    assert "in hand: step 7, slot 2, then" in loader and " in hang_for_ever" in loader
