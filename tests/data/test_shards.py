import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longtake.data.shards import (
    ShardError,
    ShardReader,
    ShardWriter,
    Span,
    list_shards,
    scan_shard,
)
from tests.planted import live_pickle


def _write(folder: Path, count: int, max_samples: int = 500, max_bytes: int = 2**28) -> list[Path]:
    with ShardWriter(folder, max_samples=max_samples, max_bytes=max_bytes) as writer:
        for i in range(count):
            writer.write(f"k{i:03d}", {"mp4": bytes([i]) * (i * 100 + 1), "json": b"{%d}" % i})
    return writer.paths


def _tar(path: Path, *members: tarfile.TarInfo | tuple[str, bytes], **options: int) -> Path:
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tuple):
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
            else:
                tar.addfile(member)
    return path


def test_round_trip_and_split_by_samples(tmp_path: Path) -> None:
    paths = _write(tmp_path, 7, max_samples=3)
    assert paths == list_shards(tmp_path) and len(paths) == 3
    reader = ShardReader(max_open=2)
    found = {}
    for path in paths:
        for entry in scan_shard(path):
            found[entry.key] = {e: reader.read(path, s) for e, s in entry.members.items()}
    assert found == {
        f"k{i:03d}": {"mp4": bytes([i]) * (i * 100 + 1), "json": b"{%d}" % i} for i in range(7)
    }


def test_equal_samples_give_equal_bytes_in_any_process(tmp_path: Path) -> None:
    (one,), (two,) = _write(tmp_path / "a", 3), _write(tmp_path / "b", 3)
    assert one.read_bytes() == two.read_bytes()


def test_webdataset_and_tarfile_read_what_is_written(tmp_path: Path) -> None:
    (path,) = _write(tmp_path, 3)
    with tarfile.open(path) as tar:
        names = tar.getnames()
    assert names == [f"k{i:03d}.{e}" for i in range(3) for e in ("json", "mp4")]
    from webdataset.compat import WebDataset

    samples = list(WebDataset(str(path), shardshuffle=False))
    assert [s["__key__"] for s in samples] == ["k000", "k001", "k002"]
    assert samples[2]["mp4"] == bytes([2]) * 201


def test_split_by_bytes(tmp_path: Path) -> None:
    paths = _write(tmp_path, 4, max_bytes=150)  # samples of 4, 104, 204 and 304 bytes
    assert [len(scan_shard(path)) for path in paths] == [2, 1, 1]


def test_an_exception_leaves_only_whole_tars(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        with ShardWriter(tmp_path, max_samples=1) as writer:
            writer.write("a", {"txt": b"1"})
            writer.write("b", {"txt": b"2"})
            raise KeyboardInterrupt
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["shard-000000.tar"]
    assert scan_shard(tmp_path / "shard-000000.tar")[0].key == "a"


def test_a_full_disk_leaves_no_half_written_tar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ShardWriter(tmp_path)
    writer.write("a", {"mp4": b"1"})

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["", "a.b", "/a", "../a", "a/../b", "a/", "a\0b", "__a", "b/__a"])
def test_keys_that_readers_would_split_are_refused(tmp_path: Path, key: str) -> None:
    with ShardWriter(tmp_path) as writer, pytest.raises(ValueError, match="relative path"):
        writer.write(key, {"txt": b""})


def test_repeated_keys_and_bad_extensions_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("a", {"txt": b""})
        with pytest.raises(ValueError, match="written twice"):
            writer.write("a", {"txt": b""})
        with pytest.raises(ValueError, match="extension"):
            writer.write("b", {".txt": b""})
        with pytest.raises(ValueError, match="no members"):
            writer.write("b", {})


def test_missing_folder_and_folder_without_tars(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        list_shards(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no \*\.tar"):
        list_shards(tmp_path)


def test_empty_and_zero_byte_tars_are_errors_by_name(tmp_path: Path) -> None:
    empty = _tar(tmp_path / "empty.tar")
    with pytest.raises(ShardError, match=r"empty\.tar: the tar holds no samples"):
        scan_shard(empty)
    zero = tmp_path / "zero.tar"
    zero.touch()
    with pytest.raises(ShardError, match=r"zero\.tar: cut at byte 0"):
        scan_shard(zero)


def test_a_tar_cut_at_any_block_is_whole_or_an_error(tmp_path: Path) -> None:
    (path,) = _write(tmp_path, 6)
    data, whole = path.read_bytes(), scan_shard(path)
    cut = tmp_path / "cut.tar"
    errors = 0
    for size in range(0, len(data), 512):
        cut.write_bytes(data[:size])
        try:
            assert scan_shard(cut) == whole  # only padding after the end mark may be missing
        except ShardError as error:
            assert "cut.tar" in str(error)
            errors += 1
    assert errors >= len(data.rstrip(b"\0")) // 512


def test_a_damaged_header_in_the_middle_is_an_error(tmp_path: Path) -> None:
    (path,) = _write(tmp_path, 6)
    data = bytearray(path.read_bytes())
    header = scan_shard(path)[3].members["mp4"].offset - 512
    data[header + 10] ^= 0xFF
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) < 12, "tarfile loses the rest in silence"
    with pytest.raises(ShardError, match=f"damaged tar header at byte {header}"):
        scan_shard(path)


@pytest.mark.parametrize("name", ["../evil.mp4", "/etc/evil.mp4", "a/../../evil.mp4", "a\\b.mp4"])
def test_absolute_and_parent_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ShardError, match="absolute or"):
        scan_shard(_tar(tmp_path / "x.tar", (name, b"1")))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("a.mp4")
    info.type, info.linkname = kind, "/etc/passwd"
    with pytest.raises(ShardError, match="link, device"):
        scan_shard(_tar(tmp_path / "x.tar", info))


def test_duplicate_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"two members are named 'a\.mp4'"):
        scan_shard(_tar(tmp_path / "x.tar", ("a.mp4", b"1"), ("b.mp4", b"2"), ("a.mp4", b"3")))


def test_joined_tars_are_refused(tmp_path: Path) -> None:
    (path,) = _write(tmp_path, 2)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ShardError, match="data follows the end mark"):
        scan_shard(path)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_folders_and_other_formats(tmp_path: Path, form: int) -> None:
    folder = tarfile.TarInfo("deep")
    folder.type = tarfile.DIRTYPE
    long_key = "deep/" + "n" * 180
    path = _tar(
        tmp_path / "x.tar",
        folder,
        (f"{long_key}.mp4", b"one"),
        ("./plain.txt", b"two"),
        ("README", b"no sample"),
        format=form,
    )
    entries = {entry.key: entry.members for entry in scan_shard(path)}
    assert entries.keys() == {long_key, "plain"}
    assert ShardReader().read(path, entries[long_key]["mp4"]) == b"one"


def test_a_read_past_the_end_is_an_error_not_a_short_answer(tmp_path: Path) -> None:
    (path,) = _write(tmp_path, 1)
    for span in (Span(path.stat().st_size - 10, 20), Span(0, 2**63 - 1), Span(-1, 1), Span(9, -1)):
        with pytest.raises(ShardError, match="where a member should"):
            ShardReader().read(path, span)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4))
def test_damaged_bytes_never_crash_the_scan(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    path = tmp_path / "fuzz.tar"
    if not path.exists():
        _tar(
            path,
            ("d/" + "n" * 120 + ".mp4", b"x" * 700),
            ("b.json", b"{}"),
            format=tarfile.PAX_FORMAT,
        )
        (tmp_path / "whole").write_bytes(path.read_bytes())
    data = bytearray((tmp_path / "whole").read_bytes())
    for position, value in flips:
        data[position % 4096] = value
    path.write_bytes(data)
    try:
        for entry in scan_shard(path):
            for span in entry.members.values():
                assert span.offset + span.size <= len(data)
    except ShardError as error:
        assert "fuzz.tar" in str(error)


def test_planted_pickles_and_libraries_are_never_executed(tmp_path: Path) -> None:
    """Index and scan a tar with members that webdataset's decoder would run."""
    proof = tmp_path / "executed"
    bomb = live_pickle(proof)
    shards = tmp_path / "shards"
    shards.mkdir()
    members = [(f"a.{ext}", bomb) for ext in ("pyd", "pickle", "pkl", "pth", "pt", "npy")]
    _tar(shards / "x.tar", *members, ("a.png", b"no image"), ("a.txt", b"caption"))
    script = (
        "import sys; from longtake.data.catalogue import build_catalogue\n"
        "try: build_catalogue(sys.argv[1], num_workers=1, progress=False)\n"
        "except ValueError as e: print(e)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(shards)], capture_output=True, text=True, check=True
    )
    assert "no usable sample" in ran.stdout
    assert not proof.exists()
    pickle.loads(bomb)
    assert proof.exists(), "the bomb must be live for this test to mean anything"


def test_webdataset_is_imported_in_its_safe_mode() -> None:
    import longtake.data.shards  # noqa: F401 - sets the variable

    assert os.environ["WDS_SECURE"] == "1"
    from webdataset.compat import WebDataset

    with pytest.raises(ValueError, match=r"(?i)secure|not allowed|pipe"):
        list(WebDataset("pipe:echo executed", shardshuffle=False))


@pytest.mark.parametrize("size", [2**63 - 1, 2**62, -1, 2**33])
def test_claims_beyond_the_file_are_refused_unread(tmp_path: Path, size: int) -> None:
    path = _tar(tmp_path / "x.tar", ("a.mp4", b"1"), format=tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[124:136] = (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 256)
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"inside 'a\.mp4'"):
        scan_shard(path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"28 size=9223372036854775807\n", "cut at byte"),
        (b"9" * 5000 + b" path=x\n", "damaged pax header"),
        (b"5009 size=" + b"9" * 5000 + b"\n", "damaged pax header"),
        (b"22 GNU.sparse.major=1\n", "sparse file"),
        (b"18 path=../a.mp4\n\n", "absolute or"),
        (b"5 x\n", "damaged pax header"),
    ],
)
def test_odd_pax_records_are_refused(tmp_path: Path, record: bytes, message: str) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    body = info.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % 512)
    member = tarfile.TarInfo("a.mp4").tobuf(tarfile.USTAR_FORMAT)
    path = tmp_path / "x.tar"
    path.write_bytes(body + member + bytes(1024))
    with pytest.raises(ShardError, match=message):
        scan_shard(path)


def test_names_beyond_all_use_are_refused(tmp_path: Path) -> None:
    name = "." * 5000 + "/a.mp4"
    with pytest.raises(ShardError, match="has 5006 characters"):
        scan_shard(_tar(tmp_path / "x.tar", (name, b"1"), format=tarfile.PAX_FORMAT))
