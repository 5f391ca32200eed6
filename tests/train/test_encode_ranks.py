"""Processes that share an encode: killed one by one and all at once, they write what one writes."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from longtake.data.latents import LatentWriter
from longtake.train.encode import encode_shards

from .conftest import Road, small_text
from .small_runs import DIT_SIZES


def encode_until(
    road: Road, out: Path, rank: int, num_ranks: int, barrier: Barrier, kill_at: int | None
) -> None:
    """A rank that waits at its first sample until all hold a shard, and dies at a later one."""
    original, written = LatentWriter.write, 0

    def write(self: LatentWriter, *args: Any, **kwargs: Any) -> None:
        nonlocal written
        written += 1
        if written == 1:
            barrier.wait(60)
        if written == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, *args, **kwargs)

    LatentWriter.write = write
    encode_shards(road.vae, road.pixels, out, small_text(), rank=rank, num_ranks=num_ranks)
    os._exit(0)


def run_until(road: Road, out: Path, kills: Sequence[int | None]) -> list[int | None]:
    """A process for each entry of `kills`, forked; their exit codes."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(kills))
    processes = [
        context.Process(target=encode_until, args=(road, out, rank, len(kills), barrier, kill_at))
        for rank, kill_at in enumerate(kills)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


@pytest.mark.dist
def test_killed_ranks_lose_and_double_nothing(road: Road, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    # Shards have three samples: both ranks die within their second one.
    assert run_until(road, out, [5, 5]) == [-signal.SIGKILL] * 2
    assert not out.exists()
    assert len(list((tmp_path / "latents.partial").glob("*.done"))) == 2
    # One of two dies and does not come back: the other one takes its shard over.
    assert run_until(road, out, [None, 2]) == [0, -signal.SIGKILL]
    assert_equal_folders(out, road.latents)
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def assert_equal_folders(found: Path, expected: Path) -> None:
    """All files alike, but for the times of change in the catalogue and the way to the VAE."""
    files = [sorted(p.relative_to(x) for p in x.rglob("*")) for x in (found, expected)]
    assert files[0] == files[1]
    for name in files[0]:
        one, other = found / name, expected / name
        if name.name in ("latents.json", "manifest.json"):
            trees = [json.loads(path.read_text()) for path in (one, other)]
            for tree in trees:
                tree.get("versions", {}).pop("vae_run", None)
                for shard in tree.get("shards", {}).values():
                    del shard["mtime_ns"]
            assert trees[0] == trees[1]
        elif one.is_file():
            assert one.read_bytes() == other.read_bytes(), name


def test_a_half_done_folder_of_other_settings_is_kept(road: Road, tmp_path: Path) -> None:
    staging = tmp_path / "x.partial"
    staging.mkdir()
    (staging / "job.json").write_text('{"variants": 2}')
    with pytest.raises(ValueError, match=r"half-done encode of other vae_hash, .*variants"):
        encode_shards(road.vae, road.pixels, tmp_path / "x", small_text())
    assert staging.is_dir()


@pytest.mark.slow
def test_the_command_on_two_processes(road: Road, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "longtake.launch.cli", "encode", "--nproc", "2"]
    places = [str(road.vae), str(road.pixels), str(tmp_path / "out"), "--device", "cpu"]
    more = ["--batch-size", "4", *DIT_SIZES]
    done = subprocess.run([*command, *places, *more], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "12 samples of 12 clips in 4 shards, about" in done.stdout
    assert_equal_folders(tmp_path / "out", road.latents)
