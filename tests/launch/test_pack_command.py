"""`longtake pack` hands its options over and says what cannot be."""

import io
import json
from pathlib import Path

import av
import pytest

from longtake.data.catalogue import load_catalogue
from longtake.data.shards import ShardReader, Span
from longtake.launch import cli
from tests.data.toy import toy_video


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two clips of 9 frames at 8 fps, one of them twice."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index, name in enumerate("aba"):
        (folder / f"{index}{name}.mp4").write_bytes(toy_video("ab".index(name)))
        (folder / f"{index}{name}.txt").write_text(f"clip {name}")
    return folder


def test_options_arrive(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.parent / "out"
    argv = ["pack", str(folder), str(out), "--recode", "16x24", "--gop", "2", "--crf", "10"]
    argv += ["--pixel-format", "yuv444p", "--max-duration", "0.5", "--min-duration", "0.3"]
    argv += ["--audio", "drop", "--workers", "1", "--max-samples", "3", "--max-bytes", "100000"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert "packed 4 clips of 2 files" in shown and "split 2 files" in shown
    assert "dropped 2 clips" in shown and "2a.mp4: same bytes as 0a.mp4" in shown
    rows = load_catalogue(out).table.to_pylist()
    assert [row["key"] for row in rows] == ["0a_000", "0a_001", "1b_000", "1b_001"]
    assert {(row["height"], row["width"], row["frames"]) for row in rows} == {(24, 24, 4)}
    assert all(row["keyframe_interval"] <= 0.25 for row in rows)
    assert len(list(out.glob("*.tar"))) == 2
    span = Span(rows[0]["payload_offset"], rows[0]["payload_size"])
    with av.open(io.BytesIO(ShardReader().read(out / rows[0]["shard"], span)), "r") as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv444p"


def test_copies_and_bytes_stay_on_request(folder: Path) -> None:
    out = folder.parent / "out"
    assert cli.main(["pack", str(folder), str(out), "--no-dedup"]) == 0
    assert len(load_catalogue(out)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gop", "4"], "--gop needs --recode"),
        (["--max-duration", "4"], "--max-duration needs --recode"),
        (["--recode", "8"], "at least 16 pixels"),
        (["--recode", "16", "--crf", "99"], "crf=99"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pack", str(folder), str(folder.parent / "out"), *options]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not (folder.parent / "out.partial").exists()


def test_everything_skipped_is_a_failure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "captions.jsonl").write_text(json.dumps({"file": "absent.mp4", "caption": "c"}))
    assert cli.main(["pack", str(folder), str(folder.parent / "out")]) == 1
    assert "nothing could be packed" in capsys.readouterr().err
