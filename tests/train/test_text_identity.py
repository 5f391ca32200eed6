"""An encoder is known by its bytes: its folder may move, its weights may not change."""

import os
import shutil
from pathlib import Path

import pytest

from longtake.models.text import TextConfig
from longtake.train.text_identity import text_hash


def test_a_moved_folder_is_the_same_encoder_and_changed_weights_are_another(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "README.md"):
        (folder / name).write_bytes(name.encode())
    before = _hash(folder)
    shutil.copytree(folder, tmp_path / "moved")
    assert _hash(tmp_path / "moved") == before
    (folder / "README.md").write_bytes(b"more")
    assert _hash(folder) == before
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        path = folder / name
        original, time = path.read_bytes(), path.stat().st_mtime_ns
        path.write_bytes(original[:-1] + b"!")  # of the same size
        os.utime(path, ns=(time, time + 1))
        assert _hash(folder) != before, name
        path.write_bytes(original)
        os.utime(path, ns=(time, time + 2))
        assert _hash(folder) == before
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        _hash(folder)


def test_names_stand_for_what_is_not_a_folder() -> None:
    known = {_hash(Path("google/umt5-xxl")), _hash(Path("google/t5-xxl")), text_hash(TextConfig())}
    assert len(known) == 3


def _hash(path: Path) -> str:
    return text_hash(TextConfig("pretrained", path=str(path)))
