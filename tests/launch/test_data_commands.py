"""The data commands do what they say, on a few clips."""

import json
from pathlib import Path

import numpy as np
import pytest

from longtake.data.decode import encode_image
from longtake.data.shards import ShardWriter, scan_shard
from longtake.launch import cli
from longtake.launch.compose import compose
from longtake.launch.dry_run import Network, networks, state_bytes
from longtake.train.engine import EngineConfig

WORLD = ("--families", "move,leftright", "--frames", "5", "--size", "16x16", "--workers", "1")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    assert cli.main(["world", str(tmp_path / "world"), "--clips", "8", *WORLD]) == 0
    return tmp_path / "world"


def test_stats(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stats", str(world)]) == 0
    shown = capsys.readouterr().out
    assert "8 samples" in shown and "leftright" in shown and "h264" in shown
    assert "caption 'dense', characters" in shown and "aspect" in shown
    assert cli.main(["stats", str(world), "--where", "family = 'move' AND frames > 1"]) == 0
    shown = capsys.readouterr().out
    assert "4 samples" in shown and "\"family = 'move'\" drops 4" in shown
    assert "'frames > 1' drops 0" in shown
    assert cli.main(["stats", str(world), "--where", "frames > 99"]) == 1
    assert "leaves no sample: 'frames > 99' drops 8" in capsys.readouterr().err


def test_stats_are_drawn(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, start in (("a.png", b"\x89PNG"), ("a.html", b"<!doctype html>")):
        assert cli.main(["stats", str(world), "--plot", str(tmp_path / name)]) == 0
        data = (tmp_path / name).read_bytes()
        assert data.startswith(start) and len(data) > 20_000
    for name, said in (("a.pdf", "must end in .png or .html"), ("no/a.png", "no folder")):
        assert cli.main(["stats", str(world), "--plot", str(tmp_path / name)]) == 1
        assert said in capsys.readouterr().err


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
    line = f"{shard}: {entry.key}.mp4: differs from the catalogue"
    assert line in captured.err and "damaged: 1 defects" in captured.out
    assert cli.main(["verify", str(world), "--no-decode", "--workers", "1"]) == 1
    assert line in capsys.readouterr().err


def test_verify_tells_defects_from_mistakes(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(world / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert cli.main(["verify", str(world), "--where", "frame > 1"]) == 2
    with pytest.raises(SystemExit) as caught:
        cli.main(["verify", str(world), "--odd"])
    assert caught.value.code == 2


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
    captured = capsys.readouterr()
    assert "8 samples in 1 shards" in captured.out and "8 samples" in captured.err
    assert cli.main(["index", str(world), "--probe", "full", "--fresh", "--dataset", "d"]) == 0
    assert "dataset d" in capsys.readouterr().out


def test_index_says_what_it_rejected_and_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("a", {"png": encode_image(np.zeros((16, 16, 3), np.uint8)), "txt": b"black"})
        writer.write("b", {"mp4": b"", "txt": b"text", "mp3": b"sound"})
    assert cli.main(["index", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "1 samples" in shown and "passed over, as they belong to no sample: 1 .mp3" in shown
    assert "rejected 1:\n  shard-000000.tar: b: empty file" in shown


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
    argv = ["world", "--show", str(tmp_path / "sheet.png"), "--families", "move", "--size", "32"]
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
    out, err = capsys.readouterr()
    config = json.loads(out)
    assert (config["stage"], config["train"]["steps"]) == ("vae", 7)
    assert "no plan, the run would end here" in err and "vae: " in err


def test_dry_run_knows_what_is_frozen() -> None:
    vae = networks(compose(["stage=vae", 'freeze=["encoder.*"]']))
    dit = networks(compose(["stage=dit", 'freeze=["dit.blocks.*"]']))
    for network in (vae[0], dit[0]):
        assert 0 < network.num_trainable < network.num_parameters


def test_dry_run_counts_what_each_rank_holds() -> None:
    network = Network("dit", num_parameters=1000, num_trainable=1000)
    ddp, zero2, zero3 = (
        EngineConfig(strategy, stage, "fp32", "none")
        for strategy, stage in (("ddp", 0), ("deepspeed", 2), ("deepspeed", 3))
    )
    assert state_bytes(network, ddp, 1) == 20_000  # weights, gradients, two moments, EMA
    assert state_bytes(network, ddp, 4) == 17_000  # only the EMA is divided
    assert state_bytes(network, zero2, 4) == 4_000 + 20_000 / 4
    assert state_bytes(network, zero3, 4) == 24_000 / 4
