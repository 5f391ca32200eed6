"""Pickles planted wherever weights and latents are read from are never executed."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from longtake.data.latents import decode_sample
from longtake.data.samples import SampleError
from longtake.models.interop import vae_from_pretrained
from longtake.train import checkpoint
from longtake.train.checkpoint import find_last_good, load_full, load_into, save
from longtake.train.engine import single_process
from longtake.train.range_files import sha256_of
from tests.planted import live_pickle
from tests.train import tiny


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """A file that every planted payload would create."""
    return tmp_path / "executed"


@pytest.fixture
def bomb(proof: Path) -> bytes:
    return live_pickle(proof)


def in_zip(bomb: bytes, path: Path) -> None:
    """The same in the archive that torch.save writes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bomb)
        archive.writestr("archive/version", "3\n")


def reseal(folder: Path) -> None:
    """Make the manifest agree with what lies in the folder, as an attacker would."""
    path = folder / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    for name, stamp in manifest["files"].items():
        stamp |= {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size}
    path.write_text(json.dumps(manifest | {"sha256": checkpoint.seal(manifest)}))


@pytest.mark.parametrize("wrap", [Path.write_bytes, lambda path, bomb: in_zip(bomb, path)])
@pytest.mark.parametrize("name", ["rank-00000.safetensors", "train_state.json", "manifest.json"])
def test_checkpoints(
    tmp_path: Path, proof: Path, bomb: bytes, name: str, wrap: Callable[[Path, bytes], object]
) -> None:
    engine = tiny.build(single_process(), "ddp")
    folder = save(tmp_path / "checkpoints", 1, engine, None, {"adversary": None}, {})
    for other in ("latest", ".metadata", "model.pt", "optimizer.pkl", "data.pickle"):
        wrap(folder / other, bomb)
    load_into(folder, engine, None)  # what lies beside it is nobody's business
    wrap(folder / name, bomb)
    if name != "manifest.json":
        assert find_last_good(folder.parent) is None
        reseal(folder)
        with pytest.raises(Exception, match=r"(?i)header|json|decode|utf|expecting"):
            load_full(folder, "param")
            load_into(folder, engine, None)
    assert (find_last_good(folder.parent) is None) == (name == "manifest.json")
    assert not proof.exists()
    pickle.loads(bomb)
    assert proof.exists(), "the bomb must be live for this test to mean anything"


def test_latents_and_public_weights(tmp_path: Path, proof: Path, bomb: bytes) -> None:
    with pytest.raises(SampleError):
        decode_sample(bomb)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    in_zip(bomb, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        vae_from_pretrained(str(tmp_path))
    assert not proof.exists()
