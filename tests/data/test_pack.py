import json
import os
from pathlib import Path

import pytest

from longtake.data import pack
from longtake.data.decode import encode_image
from longtake.data.pack import pack_folder
from longtake.data.plan import BucketConfig, DataConfig, DatasetConfig, Plan
from longtake.data.reader import SampleReader
from longtake.data.shards import ShardReader, ShardWriter, Span
from tests.data.toy import toy_frames, toy_video


def _folder(path: Path, num_clips: int = 4) -> list[dict[str, str]]:
    path.mkdir()
    lines = []
    for index in range(num_clips):
        (path / f"clip {index}.v1.mp4").write_bytes(toy_video(index))
        lines.append({"file": f"clip {index}.v1.mp4", "caption": f"a square, {index}"})
    _captions(path, lines)
    return lines


def _captions(path: Path, lines: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "captions.jsonl").write_text(text, encoding="utf-8")


def test_real_clips_go_in_as_they_are_and_come_out_as_batches(
    tmp_path: Path, real_clips: Path
) -> None:
    report = pack_folder(real_clips, tmp_path / "out", progress=False)
    assert (report.packed, report.skipped) == (10, [])
    reader = ShardReader()
    packed = {}
    for row in report.catalogue.table.to_pylist():
        span = Span(row["payload_offset"], row["payload_size"])
        packed[reader.read(tmp_path / "out" / row["shard"], span)] = row["split"]
    lines = (real_clips / "captions.jsonl").read_text().splitlines()
    files = {(real_clips / json.loads(line)["file"]).read_bytes() for line in lines}
    assert packed.keys() == files and set(packed.values()) == {"train"}
    config = DataConfig(
        train=[DatasetConfig(str(tmp_path / "out"))],
        buckets=[BucketConfig(9, 32, 32, 2)],
        micro_batches_per_step=2,
    )
    plan = Plan.from_config(config, 0)
    samples = SampleReader(plan.tables, config)
    for batch in plan.step(0):
        for sample in batch.samples:
            clip = samples.read(sample)
            assert clip.video is not None and clip.video.shape == (3, 9, 32, 32)
            assert len(clip.caption) > 8


def test_bad_files_and_lines_are_skipped_with_reasons(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    lines = _folder(folder)
    whole = toy_video(0)
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").touch()
    (folder / "notes.doc").write_text("x")
    (folder / "nobody.mp4").write_bytes(whole)
    (folder / "image.png").write_bytes(encode_image(toy_frames(0)[0]))
    outside = tmp_path / "outside.mp4"
    outside.write_bytes(whole)
    extra = [
        {"file": "cut.mp4", "caption": "cut"},
        {"file": "empty.mp4", "caption": "empty"},
        {"file": "missing.mp4", "caption": "missing"},
        {"file": "notes.doc", "caption": "doc"},
        {"file": "../outside.mp4", "caption": "outside"},
        {"file": str(outside), "caption": "outside"},
        {"file": "clip 0.v1.mp4", "caption": "again"},
        {"file": "image.png", "caption": ""},
        {"caption": "no file"},
    ]
    _captions(folder, [*lines, *extra])
    with open(folder / "captions.jsonl", "ab") as file:
        file.write(b'{"file": "x.mp4", "caption": "\xe9"}\nnot json\n\n[1]\n')
    report = pack_folder(folder, tmp_path / "out", progress=False)
    reasons = dict(report.skipped)
    assert report.packed == 4
    for name, part in {
        "cut.mp4": "truncated",
        "empty.mp4": "empty file",
        "missing.mp4": "cannot be read: No such file",
        "notes.doc": "not a video",
        "line 9": "inside the folder",
        "line 10": "inside the folder",
        "clip 0.v1.mp4": "listed twice",
        "image.png": "is empty",
        "line 13": 'has no "file"',
        "line 14": "not UTF-8",
        "line 15": "is not JSON",
        "line 17": "not a JSON object",
        "nobody.mp4": "no line in captions.jsonl",
    }.items():
        assert part in reasons[name], (name, reasons[name])
    assert len(report.skipped) == 13
    assert "packed 4 clips" in report.summary() and "skipped 13:" in report.summary()


def test_keys_are_unique_and_fit_any_reader(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub.dir").mkdir(parents=True)
    names = ["a.mp4", "a.mkv", "a.b.mp4", "sub.dir/a.mp4", "x" * 150 + ".mp4"]
    lines = []
    for name in names:
        (folder / name).write_bytes(toy_video(0))
        lines.append({"file": name, "caption": "c"})
    _captions(folder, lines)
    report = pack_folder(folder, tmp_path / "out", dedup=False, progress=False)
    keys = report.catalogue.table.column("key").to_pylist()
    assert keys[:4] == ["a", "a_", "a_b", "sub_dir/a"] and len(set(keys)) == 5
    assert max(len(key) for key in keys) < 90


def test_hostile_lines_and_names_are_counted_skips(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    lines = _folder(folder, 5)
    (folder / os.fsdecode(b"caf\xe9.mp4")).write_bytes(toy_video(0))
    lines[0] |= {"scores": {"a": 10**400}}  # type: ignore[dict-item]
    lines[1] |= {"source_id": "\ud800"}
    lines[2] |= {"source_id": 17}  # type: ignore[dict-item]
    _captions(folder, [*lines, {"file": "\ud800.mp4", "caption": "c"}])
    text = (folder / "captions.jsonl").read_bytes()
    (folder / "captions.jsonl").write_bytes(b"\xef\xbb\xbf" + text)
    report = pack_folder(folder, tmp_path / "out", progress=False)
    assert report.packed == len(report.catalogue) == 3
    reasons = dict(report.skipped)
    assert "beyond the range" in reasons["clip 0.v1.mp4"] and len(reasons) == 5
    assert "half a character" in reasons["line 2"] and "half a character" in reasons["line 6"]
    report.summary().encode()
    assert "caf\\udce9.mp4: no line" in report.summary()


def test_no_key_is_one_that_readers_pass_over(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    names = [
        "__a.mp4",
        "a.mp4",
        "[[live]] b.mp4",
        "🎬🎥c.mp4",
        "🎬🎥.mp4",
        "🎥🎬.mp4",
        "_" * 99 + ".mp4",
    ]
    for name in names:
        (folder / name).write_bytes(toy_video(0))
    _captions(folder, [{"file": name, "caption": "c"} for name in names])
    report = pack_folder(folder, tmp_path / "out", dedup=False, progress=False)
    assert (report.packed, len(report.catalogue), report.skipped) == (len(names), len(names), [])
    keys = report.catalogue.table.column("key").to_pylist()
    assert keys[:6] == ["a", "a_", "live___b", "c", "clip", "clip_"]


def test_a_clip_lost_on_the_way_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _folder(tmp_path / "in")
    monkeypatch.setattr(pack, "make_key", lambda name, suffix, used: "same")
    monkeypatch.setattr(pack.ShardWriter, "write", _first_only)
    with pytest.raises(RuntimeError, match="4 clips were packed, the catalogue knows of 1"):
        pack_folder(tmp_path / "in", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


_write = ShardWriter.write


def _first_only(self: ShardWriter, key: str, members: dict[str, bytes]) -> None:
    if self._tar is None:
        _write(self, key, members)


def test_fields_of_a_line_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    lines = _folder(folder, 3)
    lines[0] |= {"licence": "CC0", "source_id": "film", "split": "val"}
    lines[1] |= {"captions": {"short": "s"}}  # type: ignore[dict-item]
    lines[2] |= {"split": 5}  # type: ignore[dict-item]
    _captions(folder, lines)
    report = pack_folder(folder, tmp_path / "out", dataset="mine", progress=False)
    rows = report.catalogue.table.to_pylist()
    assert (rows[0]["licence"], rows[0]["split"]) == ("CC0", "val")
    assert dict(rows[1]["caption_chars"]) == {"short": 1} and rows[1]["split"] == "train"
    assert report.catalogue.dataset == "mine"
    assert report.skipped == [("clip 2.v1.mp4", "split in the json is int, not a string")]


def test_validation_is_split_by_source(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    lines = _folder(folder, 40)
    for index, line in enumerate(lines):
        line["source_id"] = f"film {index // 4}"
    _captions(folder, lines)
    report = pack_folder(folder, tmp_path / "out", val_fraction=0.4, dedup=False, progress=False)
    table = report.catalogue.table
    splits: dict[int, set[str]] = {}
    for row in table.to_pylist():
        splits.setdefault(row["source_id"], set()).add(row["split"])
    assert len(splits) == 10 and all(len(s) == 1 for s in splits.values())
    assert {s for of in splits.values() for s in of} == {"train", "val"}


def test_missing_inputs_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder of videos"):
        pack_folder(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=r"captions\.jsonl: missing; write a line"):
        pack_folder(tmp_path / "in", tmp_path / "out")
    _captions(tmp_path / "in", [{"file": "a.mp4", "caption": "c"}])
    with pytest.raises(ValueError, match="nothing could be packed"):
        pack_folder(tmp_path / "in", tmp_path / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
