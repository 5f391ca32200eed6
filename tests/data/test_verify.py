"""`longtake verify` finds every defect, and one never hides another."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from longtake.data.catalogue import index_shards
from longtake.data.catalogue.verify import VerifyReport, verify_shards
from longtake.data.shards import scan_shard
from tests.data.toy import toy_dataset, toy_meta, toy_video, write_shards


def check(folder: Path, **options: object) -> VerifyReport:
    return verify_shards(folder, num_workers=1, progress=False, **options)  # type: ignore[arg-type]


def edit(shard: Path, key: str, ext: str, change: Callable[[bytearray, int, int], None]) -> None:
    (entry,) = [entry for entry in scan_shard(shard) if entry.key == key]
    span, data = entry.members[ext], bytearray(shard.read_bytes())
    change(data, span.offset, span.size)
    shard.write_bytes(data)


def flip(data: bytearray, offset: int, size: int) -> None:
    data[offset + size // 2] ^= 1


def undecodable(frames: int = 33) -> bytes:
    """A whole header over packets of zeros."""
    data = bytearray(toy_video(1, frames))
    start = data.index(b"mdat") + 4
    middle = start + (len(data) - start) // 3
    data[middle : middle + 300] = bytes(300)
    return bytes(data)


def test_a_clean_set(tmp_path: Path) -> None:
    toy_dataset(tmp_path, 6, max_samples=3)
    assert check(tmp_path) == VerifyReport(6, [])
    report = verify_shards(tmp_path, num_workers=2, progress=False, where="key = 'clip0003'")
    assert report == VerifyReport(1, [])


def test_every_defect_of_a_shard_is_a_line_with_its_key(tmp_path: Path) -> None:
    samples = [(f"k{i}", {"mp4": toy_video(i), "json": toy_meta(i)}) for i in range(8)]
    samples[2] = ("k2", {"mp4": undecodable(), "json": toy_meta(2)})
    samples[3] = ("k3", {"mp4": b"", "json": toy_meta(3)})
    samples[4] = ("k4", {"mp4": toy_video(4), "json": b'{"split": "train"}', "txt": b"a cat"})
    index_shards(write_shards(tmp_path, samples), num_workers=1, progress=False)
    shard = tmp_path / "shard-000000.tar"
    edit(shard, "k0", "mp4", flip)
    edit(shard, "k1", "json", flip)
    edit(shard, "k4", "txt", flip)
    edit(shard, "k6", "mp4", lambda data, at, size: data.__setitem__(at - 500, 0xFF))  # its header
    lines = check(tmp_path).defects
    assert all(line.startswith(str(shard)) for line in lines)
    found = "\n".join(line.removeprefix(f"{shard}: ") for line in lines)
    for part in (
        "damaged tar header at byte",
        "k0.mp4: differs from the catalogue",
        "k1.json: differs from the catalogue",
        "k2.mp4: ",
        "k3: rejected: empty file",
        "k4.txt: differs from the catalogue",
    ):
        assert part in found
    assert len(lines) == 6, lines
    quick = check(tmp_path, decodes=False).defects
    assert [line for line in lines if "k2.mp4" not in line] == quick


def test_tars_and_catalogue_are_compared_both_ways(tmp_path: Path) -> None:
    toy_dataset(tmp_path, 12, max_samples=3)
    gone, cut, swapped, fine = (tmp_path / f"shard-00000{i}.tar" for i in range(4))
    (tmp_path / "new.tar").write_bytes(fine.read_bytes())
    gone.unlink()
    whole = cut.read_bytes()
    third = scan_shard(cut)[2].members
    cut.write_bytes(whole[: min(span.offset for span in third.values()) - 512])
    members = [(f"clip000{i}", {"mp4": toy_video(i), "json": toy_meta(i)}) for i in (6, 8)]
    write_shards(tmp_path / "other", [*members, ("extra", members[0][1])])
    swapped.write_bytes((tmp_path / "other" / "shard-000000.tar").read_bytes())
    lines = "\n".join(check(tmp_path).defects)
    for part in (
        f"{gone}: is in the catalogue but missing",
        f"{tmp_path / 'new.tar'}: is not in the catalogue",
        f"{cut}: cut at byte",
        f"{cut}: clip0005.mp4: cannot be read",
        f"{swapped}: clip0007: is in the catalogue but not in the tar",
        f"{swapped}: clip0008: lies elsewhere in the tar than the catalogue says",
        f"{swapped}: extra: is in the tar but not in the catalogue",
    ):
        assert part in lines, (part, lines)
    assert str(fine) not in lines


def test_a_damaged_part_of_the_catalogue_does_not_hide_the_clips(tmp_path: Path) -> None:
    samples = [(f"k{i}", {"mp4": toy_video(i), "json": toy_meta(i)}) for i in range(3)]
    samples[1] = ("k1", {"mp4": undecodable(), "json": toy_meta(1)})
    index_shards(write_shards(tmp_path, samples), num_workers=1, progress=False)
    part = tmp_path / "catalogue" / "shard-000000.tar.parquet"
    part.write_bytes(part.read_bytes()[:-5])
    damaged, clip = sorted(check(tmp_path).defects, key=lambda line: "k1" in line)
    assert "shard-000000.tar.parquet: damaged" in damaged and "k1.mp4" in clip


def test_latents_are_read(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save

    facts = {"frames": 9, "height": 32, "width": 32, "fps": 8}
    data = save({"latents": torch.zeros(4, 3, 4, 4)})
    samples = [("a", {"safetensors": data, "json": toy_meta(0, **facts)})]
    index_shards(write_shards(tmp_path, samples), num_workers=1, progress=False)
    assert check(tmp_path).defects == []


@pytest.mark.parametrize(
    ("where", "message"), [("frame > 1", 'column "frame" not found'), ("frames >", "syntax")]
)
def test_a_filter_that_is_not_valid_is_no_defect(tmp_path: Path, where: str, message: str) -> None:
    toy_dataset(tmp_path, 2)
    with pytest.raises(ValueError, match=message):
        check(tmp_path, where=where)


def test_without_catalogue(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        check(tmp_path / "nowhere")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.mp4"), io.BytesIO())
    with pytest.raises(ValueError, match="no catalogue"):
        check(tmp_path)
