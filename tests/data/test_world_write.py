"""Shards of the world: mixed shapes, the same bytes every time, resumed after a kill, filtered."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from longtake.data.catalogue import load_catalogue
from longtake.data.catalogue.filters import apply_filter
from longtake.data.decode import decode_clip
from longtake.data.shards import ShardReader, list_shards, scan_shard
from longtake.data.world import FAMILIES, Shapes, make_clip, write, write_world
from longtake.data.world.defects import DEFECTS

TINY = tuple(f.name for f in FAMILIES.values() if f.min_side <= 16 and f.min_frames <= 5)
SMALL = {"families": TINY, "shapes": Shapes(((16, 16),), (5,)), "progress": False}
MIXED = Shapes(((16, 16), (16, 24), (24, 16)), (1, 5, 9), (4, 8, 16))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in list_shards(folder)}


def test_shards_have_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    for workers in (1, 2):
        report = write_world(
            tmp_path / str(workers),
            num_clips=24,
            shard_size=7,
            num_workers=workers,
            **SMALL,
        )
        assert (report.num_clips, report.num_shards, report.new_shards) == (24, 4, 4)
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert one == two and len(one) == 4
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_stopped_run_goes_on_by_shard(tmp_path: Path) -> None:
    arguments = {"num_clips": 30, "shard_size": 10, "num_workers": 1, **SMALL}
    write_world(tmp_path, **arguments)
    before = contents(tmp_path)
    (tmp_path / "train-000001.tar").unlink()
    report = write_world(tmp_path, **arguments)
    assert report.new_shards == 1 and contents(tmp_path) == before
    assert write_world(tmp_path, **arguments).new_shards == 0
    with pytest.raises(ValueError, match=r"seed=1 \(was 0\)"):
        write_world(tmp_path, **{**arguments, "seed": 1})


def test_a_run_killed_before_its_catalogue_heals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"num_clips": 4, "num_workers": 1, **SMALL}
    write_world(tmp_path, **arguments)

    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(write, "build_catalogue", killed)
        with pytest.raises(KeyboardInterrupt):
            write_world(tmp_path, split="val", **arguments)
    assert write_world(tmp_path, split="val", **arguments).new_shards == 0
    assert len(load_catalogue(tmp_path)) == 8


def test_shards_carry_frames_captions_and_truth(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_world(tmp_path, num_clips=12, split=split, num_workers=1, **SMALL)
    table = load_catalogue(tmp_path).table
    assert table.num_rows == 24
    assert set(table["split"].to_pylist()) == {"train", "val"}
    assert set(table["family"].to_pylist()) == set(TINY[:12])
    assert set(zip(table["height"].to_pylist(), table["frames"].to_pylist(), strict=True)) == {
        (16, 5)
    }
    reader = ShardReader()
    shard = tmp_path / "val-000000.tar"
    for index, entry in enumerate(scan_shard(shard)):
        clip = make_clip(0, "val", index, families=TINY, frames=5, height=16, width=16)
        assert entry.key == clip.key
        video = reader.read(shard, entry.members["mp4"])
        frames = decode_clip(video, [t / 8 for t in range(5)]).astype(float)
        assert 10 * np.log10(255**2 / np.mean((frames - clip.frames) ** 2)) > 40
        assert json.loads(reader.read(shard, entry.members["json"])) == json.loads(
            json.dumps(clip.record())
        )


def test_single_frames_become_images(tmp_path: Path) -> None:
    shapes = Shapes(frames=(1,))
    families = ("move", "leftright")
    write_world(tmp_path, families=families, num_clips=6, shapes=shapes, progress=False)
    (entry, *_) = scan_shard(tmp_path / "train-000000.tar")
    assert set(entry.members) == {"png", "json"}
    assert load_catalogue(tmp_path).table["frames"].to_pylist() == [1] * 6


def test_shapes_are_mixed_in_one_folder(tmp_path: Path) -> None:
    arguments = {"families": TINY, "num_clips": 40, "shard_size": 12, "progress": False}
    for workers in (1, 2):
        write_world(
            tmp_path / str(workers),
            shapes=MIXED,
            defects=0.3,
            num_workers=workers,
            **arguments,
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    rows = load_catalogue(tmp_path / "1").table.to_pylist()
    assert {(row["height"], row["width"]) for row in rows} == set(MIXED.sizes)
    assert {row["frames"] for row in rows} == {1, 5, 9}
    assert {row["fps"] for row in rows if row["frames"] > 1} == {4, 8, 16}
    assert all(FAMILIES[row["family"]].min_frames <= row["frames"] for row in rows)
    with pytest.raises(ValueError, match=r"fps=\[8\] \(was \[4, 8, 16\]\)"):
        other = Shapes(MIXED.sizes, MIXED.frames, (8,))
        write_world(tmp_path / "1", shapes=other, defects=0.3, **arguments)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


STUCK = """
import os, sys, time
from longtake.data.world import Shapes, write, write_world

draw = write.WorldRequest.clip

def stuck(request, index):
    if index >= 17:
        open(f"{sys.argv[1]}/stuck-{os.getpid()}", "w").close()
        time.sleep(3600)
    return draw(request, index)

write.WorldRequest.clip = stuck
"""


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL in the middle of the third shard, and its workers die too; then the same again."""
    call = (
        f"write_world(sys.argv[1], families={TINY!r}, num_clips=30, shard_size=7, shapes={MIXED!r},"
        "defects=0.2, num_workers=2, progress=False)"
    )
    killed = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", f"{STUCK}\n{call}", str(killed)])
    while len(list(killed.glob("*.tar"))) < 2 or len(list(killed.glob("stuck-*"))) < 2:
        assert child.poll() is None
        time.sleep(0.01)
    assert list(killed.glob("*.tmp"))
    child.kill()
    assert child.wait() == -signal.SIGKILL
    for mark in killed.glob("stuck-*"):
        while is_running(int(mark.name.removeprefix("stuck-"))):
            time.sleep(0.01)
        mark.unlink()
    first = {path: path.stat().st_mtime_ns for path in list_shards(killed)}
    assert len(first) == 2 and not (killed / "catalogue").exists()
    arguments = {"families": TINY, "num_clips": 30, "shapes": MIXED, "defects": 0.2}
    reports = [
        write_world(folder, shard_size=7, num_workers=1, progress=False, **arguments)
        for folder in (killed, tmp_path / "whole")
    ]
    assert [report.new_shards for report in reports] == [3, 5]
    assert all(path.stat().st_mtime_ns == at for path, at in first.items())
    assert contents(killed) == contents(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(load_catalogue(killed)) == 30


def test_defects_can_be_filtered_by_kind(tmp_path: Path) -> None:
    write_world(tmp_path, num_clips=60, defects=0.5, num_workers=1, **SMALL)
    table = load_catalogue(tmp_path).table
    clean, _ = apply_filter(table, "scores['defect'] = 0", "data")
    assert 0.35 < clean.num_rows / 60 < 0.65
    truths = read_records(tmp_path / "train-000000.tar")
    assert all(not truths[key]["truth"]["defects"] for key in clean["key"].to_pylist())
    for kind in DEFECTS:
        mine, _ = apply_filter(table, f"scores['defect_{kind}'] = 1", "data")
        for key in mine["key"].to_pylist():
            (defect,) = truths[key]["truth"]["defects"]
            assert defect["type"] == kind
            if kind == "duplicate_of":
                assert defect["of"] < key and not truths[defect["of"]]["truth"]["defects"]
    with pytest.raises(ValueError, match="defects=2"):
        write_world(tmp_path / "no", num_clips=1, defects=2, **SMALL)


def read_records(shard: Path) -> dict[str, dict]:
    reader = ShardReader()
    return {
        entry.key: json.loads(reader.read(shard, entry.members["json"]))
        for entry in scan_shard(shard)
    }


def test_what_stands_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: is a file; name a folder"):
        write_world(tmp_path / "file", num_clips=1, num_workers=1, **SMALL)
    (tmp_path / "world.json").write_text("{")
    with pytest.raises(ValueError, match=r"world\.json: damaged"):
        write_world(tmp_path, num_clips=1, num_workers=1, **SMALL)
