"""Nothing in a shard or catalogue is executed: pickles, libraries and commands are only bytes."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from longtake.data.catalogue import index_shards, load_catalogue, open_manifest, read_parts
from longtake.data.catalogue.verify import verify_shards
from longtake.data.shards import ShardError, scan_shard
from tests.data.toy import toy_meta, toy_video
from tests.planted import live_pickle

LIVE = ("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "so", "py", "cbor", "mp", "ten")
PIPES = ("pipe:touch {proof}", "PIPE:touch {proof}", "pipe://touch {proof}", "exec:touch {proof}")


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """A file that every planted payload would create."""
    return tmp_path / "executed"


def plant(folder: Path, proof: Path) -> Path:
    """Good samples among members that webdataset's decoder would load, and fields that tell
    programs to run something."""
    command = PIPES[0].format(proof=proof)
    facts = dict.fromkeys(("url", "source_id", "licence", "split", "family", "__url__"), command)
    members = {
        **{f"a.{ext}": live_pickle(proof) for ext in LIVE},
        "a.mp4": toy_video(0),
        "a.json": toy_meta(0, **facts, scores={command: 1.0}, truth={"load": command}),
        "b.mp4": command.encode(),
        "b.json": toy_meta(0),
        "c.png": live_pickle(proof),
        "c.txt": b"text",
        "d.mp4": toy_video(1),
        "d.txt": command.encode(),
        "e.safetensors": live_pickle(proof),
        "e.json": toy_meta(0, frames=9, height=32, width=32, fps=8),
        "f.mp4": b"#EXTM3U\n#EXTINF:1,\n" + command.encode(),
        "f.json": live_pickle(proof),
        "pipe:touch " + proof.name + ".mp4": toy_video(2),
        "pipe:touch " + proof.name + ".txt": b"text",
        "__pycache__/x.pyc": live_pickle(proof),
    }
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder


def test_index_and_verify_execute_nothing(tmp_path: Path, proof: Path) -> None:
    shards = plant(tmp_path / "shards", proof)
    for probe in ("header", "full"):
        manifest = index_shards(shards, num_workers=1, progress=False, probe=probe)
    assert {entry["key"] for entry in manifest.rejections()} == {
        "b",
        "c",
        "e",
        "f",
        "__pycache__/x",
    }
    verify_shards(shards, num_workers=2, progress=False)
    keys = read_parts(manifest, ["x.tar"], ["key"])["key"].to_pylist()
    assert keys == ["a", "d", "pipe:touch executed"]
    assert not proof.exists() and not Path(proof.name).exists()
    pickle.loads(live_pickle(proof))
    assert proof.exists(), "the bomb must be live for this test to mean anything"


def test_the_reader_executes_nothing(tmp_path: Path, proof: Path) -> None:
    from longtake.data.samples import combine_meta
    from longtake.data.shards import ShardReader, Span

    shards = plant(tmp_path / "shards", proof)
    index_shards(shards, num_workers=1, progress=False)
    reader = ShardReader()
    for row in load_catalogue(shards).table.to_pylist():
        span = Span(row["meta_offset"], row["meta_size"])
        combine_meta([(row["meta_ext"], reader.read(shards / row["shard"], span))])
    assert not proof.exists()


@pytest.mark.parametrize("url", PIPES)
def test_commands_as_paths_are_refused(
    tmp_path: Path, proof: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}=pipe:touch {proof};")
    command = url.format(proof=proof)
    for call in (index_shards, load_catalogue, open_manifest, verify_shards):
        with pytest.raises(ValueError, match=r"touch"):
            call(command)
    plant(tmp_path / "shards", proof)
    index_shards(tmp_path / "shards", num_workers=1, progress=False)
    with pytest.raises(ValueError, match="touch"):
        load_catalogue(tmp_path / "shards", command)
    with pytest.raises((ShardError, OSError)):
        scan_shard(command)
    assert not proof.exists()


@pytest.mark.parametrize(
    "name", [*PIPES, "../shards/x.tar", "/etc/x.tar", "a\\b.tar", "x.tar\0", "pipe:touch x.tar"]
)
def test_commands_and_paths_as_shard_names_of_a_catalogue_are_refused(
    tmp_path: Path, proof: Path, name: str
) -> None:
    shards = plant(tmp_path / "shards", proof)
    index_shards(shards, num_workers=1, progress=False)
    path = shards / "catalogue" / "manifest.json"
    tree = json.loads(path.read_text())
    tree["shards"] = {name.format(proof=proof): tree["shards"]["x.tar"]}
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"is not the name of a tar|in the catalogue but missing"):
        load_catalogue(shards)
    assert not proof.exists()


def test_rows_cannot_name_other_files_or_places(tmp_path: Path, proof: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    shards = plant(tmp_path / "shards", proof)
    manifest = index_shards(shards, num_workers=1, progress=False)
    part = shards / "catalogue" / "x.tar.parquet"
    table = pq.read_table(part)
    for column, value, message in (
        ("shard", f"pipe:touch {proof}", "names other shards"),
        ("payload_size", 2**62, "outside the tar"),
        ("payload_offset", -1, "outside the tar"),
        ("meta_size", 2**63 - 1, "outside the tar"),
    ):
        index = table.schema.get_field_index(column)
        values = pa.array([value] * len(table), table.schema.field(column).type)
        pq.write_table(table.set_column(index, table.schema.field(column), values), part)
        with pytest.raises(ValueError, match=message):
            read_parts(manifest, ["x.tar"])
    assert not proof.exists()


def test_webdataset_runs_in_its_safe_mode_whatever_the_environment_says(
    tmp_path: Path, proof: Path
) -> None:
    shards = plant(tmp_path / "shards", proof)
    script = (
        "import sys, longtake.data.shards\n"
        "from webdataset.compat import WebDataset\n"
        "for url, decode in ((f'pipe:touch {sys.argv[1]}', False), (sys.argv[2], True)):\n"
        "    data = WebDataset(url, shardshuffle=False)\n"
        "    try: print(len(list(data.decode() if decode else data)))\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    for value in ("0",):
        run = subprocess.run(
            [sys.executable, "-c", script, str(proof), str(shards / "x.tar")],
            env={**os.environ, "WDS_SECURE": value},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "Error" in run.stdout
        assert not proof.exists()
