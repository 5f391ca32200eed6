"""The data commands do what they say, on a few clips."""

import json
from pathlib import Path

import pytest

from longtake.data.shards import scan_shard
from longtake.launch import cli

WORLD = ("--families", "move,leftright", "--frames", "5", "--size", "16x16", "--workers", "1")
NANO = ("experiment=nano_identity", "data.micro_batches_per_step=2")
BUCKET = "data.buckets=[{frames: 5, height: 16, width: 16, batch_size: 2}]"


@pytest.fixture
def world(tmp_path: Path) -> Path:
    assert cli.main(["world", str(tmp_path / "world"), "--clips", "8", *WORLD]) == 0
    return tmp_path / "world"


def test_stats(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stats", str(world)]) == 0
    shown = capsys.readouterr().out
    assert "8 samples" in shown and "leftright" in shown and "h264" in shown
    assert cli.main(["stats", str(world), "--where", "family = 'move'"]) == 0
    assert "4 samples" in capsys.readouterr().out


def test_verify_names_the_damaged_sample(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(world)]) == 0
    assert "intact" in capsys.readouterr().out
    shard = next(world.glob("*.tar"))
    entry = scan_shard(shard)[5]
    data = bytearray(shard.read_bytes())
    data[entry.members["mp4"].offset + 100] ^= 1
    shard.write_bytes(data)
    assert cli.main(["verify", str(world)]) == 1
    captured = capsys.readouterr()
    assert f"{entry.key}.mp4 differs" in captured.err and "damaged: 1" in captured.out


def test_verify_names_the_cut_shard(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next(world.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-20_000])
    assert cli.main(["verify", str(world)]) == 1
    assert shard.name in capsys.readouterr().err


def test_index_and_missing_catalogue(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (world / "catalogue").iterdir():
        path.unlink()
    (world / "catalogue").rmdir()
    assert cli.main(["stats", str(world)]) == 1
    assert "longtake index" in capsys.readouterr().err
    assert cli.main(["index", str(world), "--workers", "1"]) == 0
    assert "8 samples" in capsys.readouterr().out


def test_plan_steps_prints_json_lines(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    argv = ["plan-steps", *NANO, "--first", "3", "--steps", "2"]
    argv += [f"data.train.0.path={world}", f"data.val.0.path={world}", BUCKET]
    assert cli.main(argv) == 0
    batches = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(b["step"], b["slot"]) for b in batches] == [(3, 0), (3, 1), (4, 0), (4, 1)]
    assert all(len(b["samples"]) == 2 for b in batches)
    assert {"key", "shape", "seed", "caption_kind"} <= set(batches[0]["samples"][0])


def test_pack_a_folder(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    shard = next(world.glob("*.tar"))
    span = scan_shard(shard)[0].members["mp4"]
    (folder / "a.mp4").write_bytes(shard.read_bytes()[span.offset : span.offset + span.size])
    lines = [{"file": "a.mp4", "caption": "a shape"}, {"file": "b.mp4", "caption": "absent"}]
    (folder / "captions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert cli.main(["pack", str(folder), str(tmp_path / "packed")]) == 0
    shown = capsys.readouterr().out
    assert "packed 1" in shown and "b.mp4" in shown
    assert cli.main(["stats", str(tmp_path / "packed")]) == 0


def test_real_clips_pack(real_clips: Path, tmp_path: Path) -> None:
    assert cli.main(["pack", str(real_clips), str(tmp_path / "packed")]) == 0
    assert cli.main(["verify", str(tmp_path / "packed")]) == 0


def test_contact_sheet(tmp_path: Path) -> None:
    argv = ["world", str(tmp_path / "sheet.png"), "--show", "--families", "move", "--size", "32"]
    assert cli.main(argv) == 0
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.stepz=3", "train.stepz"),
        ("+train.stepz=3", "train.stepz"),
        ("train.steps=many", "train.steps"),
        ("experiment=absent", "absent"),
        ("model.hidden_size=127", "model.hidden_size"),
    ],
)
def test_config_mistakes_are_one_line(
    override: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", override, "--dry-run"]) == 1
    error = capsys.readouterr().err.strip()
    assert named in error and len(error.splitlines()) == 1


def test_dry_run_prints_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--dry-run", "experiment=demo_vae", "train.steps=7"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert (config["stage"], config["train"]["steps"]) == ("vae", 7)
