"""Runs come back from disk with the weights asked for; what cannot be read says why."""

import json
from pathlib import Path

import pytest
import torch

from longtake.train.runs import find_run, load_dit, load_run, load_vae, pick_device

from .small_runs import write_vae_run, write_world


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    return write_vae_run(root / "vae", write_world(root / "world"))


def test_folder_and_checkpoint_are_the_same_run(vae_run: Path) -> None:
    by_folder = load_run(vae_run)
    by_checkpoint = load_run(vae_run / "checkpoints" / "step-00000001")
    assert by_folder.place == by_checkpoint.place
    assert by_folder.place.folder == vae_run.resolve()
    assert by_folder.place.step == 1


def test_ema_and_raw_differ(vae_run: Path) -> None:
    ema, raw = load_vae(vae_run, "ema"), load_vae(vae_run, "raw")
    weights = ema.vae.state_dict()["encoder.conv_in.weight"]
    assert not torch.equal(weights, raw.vae.state_dict()["encoder.conv_in.weight"])
    assert not any(p.requires_grad for p in ema.vae.parameters())


def test_a_dit_is_not_a_vae(vae_run: Path) -> None:
    with pytest.raises(ValueError, match="stage=vae must be dit"):
        load_dit(vae_run)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        find_run(tmp_path / "absent")


def test_folder_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint"):
        find_run(tmp_path)


def test_flipped_byte_is_noticed(vae_run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(vae_run, copy)
    shard = copy / "checkpoints" / "step-00000001" / "rank-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="no checkpoint that verifies"):
        load_run(copy)
    with pytest.raises(ValueError, match="damaged"):
        load_run(copy / "checkpoints" / "step-00000001")


def test_config_of_other_sizes_is_refused(vae_run: Path, tmp_path: Path) -> None:
    from longtake.train import runs

    loaded = load_vae(vae_run)
    tree = json.loads((loaded.place.checkpoint / "config.json").read_text())
    tree["vae"]["base_dim"] = 16
    config = runs.parse_config(tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "read_run_config", lambda place: config)
        with pytest.raises(ValueError, match="does not fit its own config"):
            load_run(vae_run)


def test_unknown_weights_and_devices(vae_run: Path) -> None:
    with pytest.raises(ValueError, match="--weights best"):
        load_run(vae_run, "best")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device=cuda"):
            pick_device("cuda")
