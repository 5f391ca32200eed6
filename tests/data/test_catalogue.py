import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from longtake.data.catalogue import build_catalogue, load_catalogue
from longtake.data.catalogue.filters import split_clauses
from longtake.data.catalogue.indexing import name_hash
from longtake.data.decode import encode_image
from tests.data.toy import toy_dataset, toy_frames, toy_meta, toy_video, write_shards


def test_rows_say_what_the_shards_hold(tmp_path: Path) -> None:
    png = encode_image(toy_frames(2)[0])
    samples = [
        ("a", {"mp4": toy_video(0, 17), "json": toy_meta(0, licence="CC0", scores={"flow": 2})}),
        ("b", {"mp4": toy_video(1, 9, 16, 48), "txt": "une légende".encode()}),
        ("c", {"png": png, "json": toy_meta(2, source_id="a", family="move")}),
    ]
    table = build_catalogue(write_shards(tmp_path / "set", samples), progress=False).table
    rows = table.to_pylist()
    assert [r["frames"] for r in rows] == [17, 9, 1]
    assert [(r["height"], r["width"]) for r in rows] == [(32, 32), (16, 48), (32, 32)]
    assert [r["fps"] for r in rows] == [8, 8, 0]
    assert [r["duration"] for r in rows] == [17 / 8, 9 / 8, 0]
    assert [r["codec"] for r in rows] == ["h264", "h264", "png"]
    assert dict(rows[1]["caption_chars"]) == {"dense": 11, "short": 11}
    assert rows[2]["source_id"] == rows[0]["sample_id"] == rows[0]["source_id"]
    assert rows[0]["licence"] == "CC0" and dict(rows[0]["scores"]) == {"flow": 2.0}
    assert rows[2]["family"] == "move" and rows[1]["family"] is None
    shard = (tmp_path / "set" / rows[2]["shard"]).read_bytes()
    assert shard[rows[2]["payload_offset"] :][: rows[2]["payload_size"]] == png


def test_unusable_samples_are_listed_with_their_reasons(tmp_path: Path) -> None:
    video = toy_video(0)
    latents = save({"latents": torch.zeros(4, 3, 4, 4)})
    flat = save({"latents": torch.zeros(0, 1, 1, 99999999999)})
    size = {"height": 32, "width": 32, "fps": 8}
    samples = [
        ("good", {"mp4": video, "json": toy_meta(0)}),
        ("truncated", {"mp4": video[: len(video) // 2], "json": toy_meta(0)}),
        ("zero", {"mp4": b"", "json": toy_meta(0)}),
        ("nocaption", {"mp4": video}),
        ("emptycaption", {"mp4": video, "json": b'{"captions": {"dense": " "}}'}),
        ("nokinds", {"mp4": video, "json": b'{"fps": 8}'}),
        ("latin1", {"mp4": video, "txt": "légende".encode("latin-1")}),
        ("halfchar", {"mp4": video, "json": b'{"caption": "\\ud83d"}'}),
        ("notjson", {"mp4": video, "json": b"{"}),
        ("deep", {"mp4": video, "json": b"[" * 100_000}),
        ("huge", {"mp4": video, "txt": b"x" * 1_000_000}),
        ("novideo", {"json": toy_meta(0), "wav": b"1"}),
        ("two", {"mp4": video, "mkv": video, "json": toy_meta(0)}),
        ("score", {"mp4": video, "json": toy_meta(0, scores={"a": 10**400})}),
        ("source", {"mp4": video, "json": toy_meta(0, source_id="\ud800")}),
        ("split", {"mp4": video, "json": toy_meta(0, split="\ud800")}),
        ("kind", {"mp4": video, "json": b'{"captions": {"\\ud800": "x"}}'}),
        ("truth", {"mp4": video, "json": toy_meta(0, truth={"a": ["\ud800"]})}),
        ("frames", {"safetensors": latents, "json": toy_meta(0, frames=99999999999, **size)}),
        ("rate", {"safetensors": latents, "json": toy_meta(0, frames=10**400, **size)}),
        ("shape", {"safetensors": flat, "json": toy_meta(0, frames=9, **size)}),
        ("playlist", {"mp4": b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "json": toy_meta(0)}),
    ]
    catalogue = build_catalogue(write_shards(tmp_path, samples, 100), progress=False)
    assert catalogue.table.column("key").to_pylist() == ["good"]
    reasons = {entry["key"]: entry["reason"] for entry in catalogue.rejected}
    assert reasons.keys() == {key for key, _ in samples[1:]}
    for key, part in {
        "truncated": "truncated",
        "zero": "empty file",
        "nocaption": "caption missing",
        "emptycaption": "is empty",
        "nokinds": "caption missing",
        "latin1": "not UTF-8",
        "halfchar": "not UTF-8",
        "notjson": "cannot be read",
        "deep": "cannot be read",
        "huge": "1000000 characters",
        "novideo": "no video",
        "two": "several payloads",
        "score": "beyond the range",
        "source": "half a character",
        "split": "half a character",
        "kind": "half a character",
        "truth": "half a character",
        "frames": "not a number within",
        "rate": "not a number within",
        "shape": "beyond all use",
        "playlist": "unknown container",
    }.items():
        assert part in reasons[key], (key, reasons[key])


def test_shards_of_other_tools_are_read(tmp_path: Path) -> None:
    video, mark = toy_video(0), b"\xef\xbb\xbf"
    samples = [
        ("upper", {"MP4": video, "TXT": b"a cat"}),
        ("marked", {"mp4": video, "txt": mark + b"a cat"}),
        ("markedjson", {"mp4": video, "json": mark + b'{"caption": "a cat", "source_id": 17}'}),
        ("both", {"mp4": video, "json": b'{"url": "u", "licence": "CC0"}', "txt": b"a cat"}),
        ("neither", {"mp4": video, "json": b'{"url": "u"}', "txt": b" "}),
        ("twice", {"mp4": video, "MP4": video, "txt": b"a cat"}),
    ]
    catalogue = build_catalogue(write_shards(tmp_path, samples), dataset="d", progress=False)
    rows = catalogue.table.to_pylist()
    assert [row["key"] for row in rows] == ["upper", "marked", "markedjson", "both"]
    assert all(dict(row["caption_chars"]) == {"dense": 5, "short": 5} for row in rows)
    assert (rows[0]["ext"], rows[0]["meta_ext"]) == ("mp4", "txt")
    assert rows[2]["source_id"] == name_hash("d", "17")
    assert (rows[3]["meta_ext"], rows[3]["licence"]) == ("json", "CC0")
    assert [text["ext"] for text in rows[3]["texts"]] == ["txt"]
    lines = catalogue.rejections(limit=1)
    assert lines[0] == "rejected 2:" and "neither" in lines[1] and "1 more" in lines[2]


def test_any_number_of_workers_gives_the_same_catalogue(tmp_path: Path) -> None:
    one = toy_dataset(tmp_path / "set", 12, max_samples=4)
    many = build_catalogue(tmp_path / "set", num_workers=2, progress=False)
    assert one.table.equals(many.table) and one.fingerprint == many.fingerprint
    moved = shutil.move(tmp_path / "set", tmp_path / "elsewhere")
    assert load_catalogue(moved).fingerprint == one.fingerprint


def test_catalogue_may_lie_apart_from_read_only_shards(tmp_path: Path) -> None:
    samples = [("a", {"mp4": toy_video(0), "json": toy_meta(0)})]
    shards = write_shards(tmp_path / "shards", samples)
    built = build_catalogue(shards, out=tmp_path / "apart", progress=False)
    assert not (shards / "catalogue").exists()
    assert load_catalogue(shards, tmp_path / "apart").fingerprint == built.fingerprint


def test_a_tar_without_catalogue_is_not_read(tmp_path: Path) -> None:
    write_shards(tmp_path, [("a", {"mp4": b"1", "txt": b"x"})])
    with pytest.raises(ValueError, match="run `longtake index"):
        load_catalogue(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        load_catalogue(tmp_path / "nowhere")


def test_changed_missing_and_new_shards_are_refused_by_name(tmp_path: Path) -> None:
    toy_dataset(tmp_path, 8, max_samples=4)
    second = tmp_path / "shard-000001.tar"
    whole = second.read_bytes()
    second.write_bytes(whole[:-512])
    with pytest.raises(ValueError, match=r"shard-000001\.tar: has .* changed after indexing"):
        load_catalogue(tmp_path)
    second.unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar: is in the catalogue but missing"):
        load_catalogue(tmp_path)
    second.write_bytes(whole)
    (tmp_path / "new.tar").write_bytes(whole)
    with pytest.raises(ValueError, match=r"new\.tar: is not in the catalogue"):
        load_catalogue(tmp_path)


def test_a_damaged_shard_stops_the_index_and_keeps_the_old_catalogue(tmp_path: Path) -> None:
    before = toy_dataset(tmp_path, 8, max_samples=4)
    second = tmp_path / "shard-000001.tar"
    whole = second.read_bytes()
    second.write_bytes(whole[:3000])
    with pytest.raises(ValueError, match=r"shard-000001\.tar: cut at byte 3000"):
        build_catalogue(tmp_path, progress=False)
    second.write_bytes(whole)
    assert load_catalogue(tmp_path).fingerprint == before.fingerprint


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    sample = [("same", {"mp4": toy_video(0), "json": toy_meta(0)})]
    write_shards(tmp_path, sample)
    os.replace(tmp_path / "shard-000000.tar", tmp_path / "other.tar")
    write_shards(tmp_path, sample)
    with pytest.raises(ValueError, match=r"'same' is in other\.tar and in shard-000000\.tar"):
        build_catalogue(tmp_path, progress=False)


def test_damaged_or_foreign_catalogues_are_refused(tmp_path: Path) -> None:
    toy_dataset(tmp_path, 4)
    part = tmp_path / "catalogue" / "shard-000000.tar.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"shard-000000\.tar\.parquet: damaged"):
        load_catalogue(tmp_path)
    part.write_bytes(whole)
    manifest = tmp_path / "catalogue" / "manifest.json"
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**fields, "schema_version": 99}))
    with pytest.raises(ValueError, match="schema_version=99"):
        load_catalogue(tmp_path)
    manifest.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_catalogue(tmp_path)
    with pytest.raises(ValueError, match="is not a catalogue"):
        build_catalogue(tmp_path, out=tmp_path, progress=False)


def test_a_shard_without_any_sample_is_an_error(tmp_path: Path) -> None:
    tarfile.open(tmp_path / "empty.tar", "w").close()
    with pytest.raises(ValueError, match=r"empty\.tar: the tar holds no samples"):
        build_catalogue(tmp_path, progress=False)


def test_filters_count_what_each_clause_drops(tmp_path: Path) -> None:
    samples = [
        (
            f"k{i}",
            {
                "mp4": toy_video(i),
                "json": toy_meta(i, scores={"s": i}, split="val" if i > 7 else "train"),
            },
        )
        for i in range(10)
    ]
    catalogue = build_catalogue(write_shards(tmp_path, samples), progress=False)
    report = catalogue.filter("split = 'train' AND scores['s'] BETWEEN 2 AND 5")
    assert report.kept == len(report.catalogue) == 4
    assert report.dropped == {"split = 'train'": 2, "scores['s'] BETWEEN 2 AND 5": 4}
    assert report.catalogue.table.column("key").to_pylist() == ["k2", "k3", "k4", "k5"]
    assert report.catalogue.fingerprint != catalogue.fingerprint
    assert catalogue.filter("").catalogue is catalogue
    assert catalogue.filter("family = 'move' OR frames = 9").kept == 10, "NULL counts as false"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("frame > 2", 'column "frame" not found'),
        ("frames >", "where='frames >'"),
        ("frames > 1000", "leaves no sample: 'frames > 1000' drops 4"),
        ("frames > 1; DROP TABLE catalogue", "';' is no part of an expression"),
        ("(SELECT count(*) FROM read_csv('/etc/passwd')) > 0", "looks at other rows"),
    ],
)
def test_bad_filters_are_errors_that_quote_them(tmp_path: Path, where: str, message: str) -> None:
    catalogue = toy_dataset(tmp_path, 4)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        catalogue.filter(where)
    assert where in str(caught.value)


def test_clauses_split_only_where_and_joins_the_whole() -> None:
    assert split_clauses("a AND b and c") == ["a", "b", "c"]
    assert split_clauses("a BETWEEN 1 AND 2 AND b") == ["a BETWEEN 1 AND 2", "b"]
    assert split_clauses("(a AND b) AND x = ' AND '") == ["(a AND b)", "x = ' AND '"]
    assert split_clauses("a AND b OR c") == ["a AND b OR c"]
    assert split_clauses("(a OR b) AND c") == ["(a OR b)", "c"]
    assert split_clauses("CASE WHEN a AND b THEN c END") == ["CASE WHEN a AND b THEN c END"]
    assert split_clauses("ordinary > 1 AND brand = 2") == ["ordinary > 1", "brand = 2"]


def test_sample_ids_are_stable(tmp_path: Path) -> None:
    samples = [("a", {"mp4": toy_video(0), "json": toy_meta(0)})]
    catalogue = build_catalogue(write_shards(tmp_path, samples), dataset="d", progress=False)
    ids = np.asarray(catalogue.table.column("sample_id"))
    assert ids.dtype == np.uint64 and ids[0] == 2115404412111865766
