"""Tars of other tools: what becomes a sample, and what is refused rather than paired."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from longtake.data.catalogue import CatalogueManifest, index_shards, read_parts
from longtake.data.catalogue.indexing import index_shard
from longtake.data.decode import encode_image
from longtake.data.samples import SampleError, combine_meta
from longtake.data.shards import ShardError, ShardReader, Span
from tests.data.toy import toy_frames, toy_video

VIDEO = toy_video(0)
OTHER = toy_video(1)
JPG = encode_image(toy_frames(2)[0])  # named .jpg: the content decides, as everywhere


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def indexed(
    folder: Path, members: dict[str, bytes]
) -> tuple[CatalogueManifest, dict[str, dict[str, Any]], dict[str, str]]:
    """The manifest, rows by key, and reasons by rejected key."""
    tar(folder / "00000.tar", members)
    manifest = index_shards(folder, num_workers=1, progress=False)
    rows = read_parts(manifest, list(manifest.shards)).to_pylist()
    rejected = {entry["key"]: entry["reason"] for entry in manifest.rejections()}
    return manifest, {row["key"]: row for row in rows}, rejected


def captions(folder: Path, row: dict[str, Any]) -> dict[str, str]:
    """Read back by offset, as a reader does."""
    reader, path = ShardReader(), folder / row["shard"]
    first = {"ext": row["meta_ext"], "offset": row["meta_offset"], "size": row["meta_size"]}
    texts = [first, *(row["texts"] or [])]
    read = [(t["ext"], reader.read(path, Span(t["offset"], t["size"]))) for t in texts]
    meta = combine_meta(read)
    assert {kind: len(text) for kind, text in meta.captions.items()} == dict(row["caption_chars"])
    return meta.captions


def test_video2dataset(tmp_path: Path) -> None:
    facts = {"url": "https://x/y.mp4", "key": "000000001", "status": "success", "caption": "a cat"}
    members = {
        "000000001.mp4": VIDEO,
        "000000001.json": json.dumps(facts).encode(),
        "000000001.txt": b"a cat",
        "000000002.json": json.dumps({**facts, "status": "failed_to_download"}).encode(),
        "000000003.mp4": VIDEO,
        "000000003.m4a": b"sound",
        "000000003.txt": b"a dog",
    }
    (tmp_path / "00000_stats.json").write_text("{}")
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    manifest, rows, rejected = indexed(tmp_path, members)
    assert captions(tmp_path, rows["000000001"]) == {"dense": "a cat", "short": "a cat"}
    assert captions(tmp_path, rows["000000003"]) == {"dense": "a dog", "short": "a dog"}
    assert rejected == {"000000002": "no video, image or latents"}
    assert manifest.passed_over == {".m4a": 1}
    assert "passed over, as they belong to no sample: 1 .m4a" in manifest.remarks()


def test_img2dataset_in_folders_and_mixed_with_video(tmp_path: Path) -> None:
    facts = {"caption": "a cat", "url": "u", "width": 999, "height": 999, "exif": "{}"}
    members = {
        "a/0001.jpg": JPG,
        "a/0001.json": json.dumps(facts).encode(),
        "a/0001.txt": b"a cat\n",
        "b/0001.webm": VIDEO,
        "b/0001.txt": b"a dog",
        "./c/0001.png": JPG,
        "./c/0001.json": json.dumps({**facts, "caption": None}).encode(),
        "./c/0001.txt": b"a bird",
    }
    _, rows, rejected = indexed(tmp_path, members)
    assert not rejected and rows.keys() == {"a/0001", "b/0001", "c/0001"}
    assert (rows["a/0001"]["width"], rows["a/0001"]["frames"]) == (32, 1)
    assert rows["b/0001"]["frames"] == 9
    assert captions(tmp_path, rows["c/0001"])["dense"] == "a bird"
    assert rows["c/0001"]["meta_ext"] == "json", "what the json says reaches the reader"


def test_energon_names_and_several_captions(tmp_path: Path) -> None:
    members = {
        "s1.video.mp4": VIDEO,
        "s1.meta.json": b'{"captions": {"dense": "a long text"}, "truth": {}, "split": "val"}',
        "s1.caption.txt": b"a text",
        "s1.depth.npy": b"numbers",
        "s2.video.mp4": OTHER,
        "s2.short.txt": b"brief",
        "s2.zh.txt": "猫".encode(),
        "s3.mp4": VIDEO,
        "s3.json": b'{"captions": ["one", "two", "three"]}',
        "s4.mp4": VIDEO,
        "s4.txt": b"plain",
        "s4.short.txt": b"brief",
        "__index__": b"",
        ".DS_Store": b"",
        "README": b"",
    }
    manifest, rows, rejected = indexed(tmp_path, members)
    assert not rejected and list(rows) == ["s1", "s2", "s3", "s4"]
    assert captions(tmp_path, rows["s1"]) == {"dense": "a long text", "short": "a text"}
    assert rows["s1"]["split"] == "val" and rows["s1"]["meta_ext"] == "meta.json"
    assert captions(tmp_path, rows["s2"]) == {"short": "brief", "zh": "猫"}
    assert captions(tmp_path, rows["s3"]) == {
        **{f"caption_{i}": text for i, text in enumerate(("one", "two", "three"), start=1)},
        "dense": "one",
        "short": "one",
    }
    assert captions(tmp_path, rows["s4"]) == {"dense": "plain", "short": "brief"}
    odd = {".npy": 1, "__name": 1, "hidden": 1, "no extension": 1}
    assert manifest.passed_over == odd


def test_keys_with_dots(tmp_path: Path) -> None:
    members = {
        "v1.0.mp4": VIDEO,
        "v1.0.txt": b"zero",
        "v1.5.mp4": OTHER,
        "v1.5.json": b'{"caption": "five"}',
        "v1.5.short.txt": b"5",
        "v1.7.mp4": VIDEO,  # its caption is lost
        "v1.8.txt": b"eight",  # its video is lost
        "v2.0.mp4": OTHER,
        "v2.0.txt": b"alone",
    }
    _, rows, rejected = indexed(tmp_path, members)
    assert rows.keys() == {"v1.0", "v1.5", "v2.0"}
    assert captions(tmp_path, rows["v1.0"])["dense"] == "zero"
    assert captions(tmp_path, rows["v1.5"]) == {"dense": "five", "short": "5"}
    assert rejected == {
        "v1.7": "caption missing: neither json nor txt",
        "v1.8": "no video, image or latents",
    }


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        # Two samples of one prefix, each with half lost: pairing them would be a lie.
        ({"v.1.mp4": VIDEO, "v.2.txt": b"two"}, "ambiguous: it is not clear that 2.txt"),
        ({"v.mp4": VIDEO, "v.2.json": b'{"caption": "two"}'}, "not clear that 2.json"),
        ({"v.left.mp4": VIDEO, "v.meta.json": b'{"caption": "x"}'}, "not clear that meta.json"),
        ({"v.a.mp4": VIDEO, "v.b.mp4": OTHER, "v.txt": b"x"}, "several payloads: a.mp4, b.mp4"),
        ({"v.mp4": VIDEO, "v.mkv": VIDEO, "v.txt": b"x"}, "several payloads"),
        ({"v.mp4": VIDEO, "v.json": b"{}", "v.meta.json": b"{}"}, "several json members"),
        ({"v.mp4": VIDEO, "v.json": b'{"caption": "a"}', "v.txt": b"b"}, "json and txt differ"),
        ({"v.mp4": VIDEO, "v.txt": b"a", "v.TXT": b"b"}, "differ"),
        (
            {"v.mp4": VIDEO, "v.json": b'{"captions": {"short": "a"}}', "v.short.txt": b"b"},
            "two captions of kind 'short' differ",
        ),
        ({"v.mp4": VIDEO, "v.short.txt": b""}, "caption 'short' is empty"),
        ({"v.mp4": VIDEO, "v.json": b'{"caption": 7}'}, "caption in the json is int"),
        ({"v.mp4": VIDEO, "v.json": b'{"captions": "text"}'}, "neither a mapping"),
        ({"v.mp4": VIDEO, "v.json": b'{"captions": ["a", []]}'}, "is not a text"),
        ({"v.mp4": VIDEO, "v.json": b'{"captions": {"dense": [1]}}'}, "is not a text"),
        ({"v.mp4": VIDEO, "v.odd.txt": b"x"}, "not clear that odd.txt describes mp4"),
    ],
)
def test_what_leaves_a_doubt_is_refused(
    tmp_path: Path, members: dict[str, bytes], reason: str
) -> None:
    good = {"good.mp4": VIDEO, "good.txt": b"good"}
    _, rows, rejected = indexed(tmp_path, {**members, **good})
    assert list(rows) == ["good"]
    assert len(rejected) == 1 and reason in next(iter(rejected.values()))


def test_texts_of_unknown_names_are_passed_over_and_counted(tmp_path: Path) -> None:
    members = {"v.mp4": VIDEO, "v.txt": b"a cat", "v.2.txt": b"of v.2?", "v.tags.json": b"{}"}
    manifest, rows, rejected = indexed(tmp_path, members)
    assert captions(tmp_path, rows["v"]) == {"dense": "a cat", "short": "a cat"}
    assert not rejected and manifest.passed_over == {".2.txt": 1, ".tags.json": 1}


def test_huge_members_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longtake.data.catalogue import indexing

    monkeypatch.setattr(indexing, "MAX_PAYLOAD_BYTES", len(VIDEO))
    members = {
        "json.mp4": VIDEO,
        "json.json": b'{"a": "' + b"x" * indexing.MAX_META_BYTES + b'"}',
        "text.mp4": VIDEO,
        "text.txt": b"x" * 1_000_000,
        "clip.mp4": VIDEO + b"\0",
        "clip.txt": b"x",
        "good.mp4": VIDEO,
        "good.txt": b"x",
    }
    _, rows, rejected = indexed(tmp_path, members)
    assert list(rows) == ["good"]
    assert "json of 4194313 bytes is over the limit" in rejected["json"]
    assert "has 1000000 characters" in rejected["text"]
    assert "mp4 of" in rejected["clip"] and "over the limit" in rejected["clip"]


@pytest.mark.parametrize("data", [b"[" * 10**6, b'{"a":' * 10**5, b"9" * 10**6, b"{", b"null"])
def test_hostile_json_is_a_reason(data: bytes) -> None:
    with pytest.raises(SampleError):
        combine_meta([("json", data)])


def test_a_tar_cut_or_holed_anywhere_never_pairs_a_clip_with_another_caption(
    tmp_path: Path,
) -> None:
    """Every cut at a block, and every single member lost, over keys that are easily confused."""
    keys = ("v", "v.1", "v.1.a", "v.2", "w", "w.video")
    members: dict[str, bytes] = {}
    for index, key in enumerate(keys):
        members[f"{key}.png"] = encode_image(toy_frames(index, 1, 16, 16)[0]) + bytes([index])
        members[f"{key}.txt"] = f"caption of {index}".encode()
    path = tar(tmp_path / "x.tar", members)
    data, count, whole = path.read_bytes(), 0, 0
    for size in range(0, len(data) + 1, 512):
        path.write_bytes(data[:size])
        try:
            index = index_shard(path, "d")
        except ShardError:
            count += 1
            continue
        assert len(index.rows) == len(keys), "what is shorter is never read"
        whole += 1
    assert count >= len(data.rstrip(b"\0")) // 512 and whole > 0
    for lost in members:
        tar(path, {name: member for name, member in members.items() if name != lost})
        index = index_shard(path, "d")
        # A video.png may be the clip of w or of w.video: where that decides, neither is read.
        doubts = 2 if lost.startswith("w.") else 1
        assert len(index.rows) >= len(keys) - doubts, lost
        assert index.rejected or index.passed_over, "nothing is lost in silence"
        content = path.read_bytes()
        for row in index.rows:
            number = content[row["payload_offset"] + row["payload_size"] - 1]
            text = content[row["meta_offset"] :][: row["meta_size"]].decode()
            assert text == f"caption of {number}" and not row["texts"], (lost, row["key"])
