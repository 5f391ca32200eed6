"""Latents are the VAE's posterior means, whole or absent, and the same after a kill."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.data.catalogue import load_catalogue
from longtake.data.decode import decode_clip
from longtake.data.latents import decode_sample, read_manifest
from longtake.data.shards import ShardReader, Span, scan_shard
from longtake.models.text import Tokenizer
from longtake.models.vae import vae_hash
from longtake.train import encode
from longtake.train.encode import encode_shards
from longtake.train.playback import to_pixels
from longtake.train.runs import load_vae

from .conftest import Road, small_text
from .small_runs import FRAMES, write_vae_run, write_world


def test_latents_are_posterior_means(road: Road) -> None:
    loaded = load_vae(road.vae)
    pixels, latents = load_catalogue(road.pixels), load_catalogue(road.latents)
    assert latents.dataset == pixels.dataset
    assert sorted(latents.table["sample_id"].to_pylist()) == sorted(
        pixels.table["sample_id"].to_pylist()
    )
    reader = ShardReader()
    by_key = {row["key"]: row for row in pixels.table.to_pylist()}
    row = latents.table.to_pylist()[4]
    source = by_key[row["key"]]
    stored = decode_sample(payload(reader, road.latents, row))
    frames = decode_clip(
        payload(reader, road.pixels, source), [(i + 0.5) / 8 for i in range(FRAMES)]
    )
    mean = loaded.vae.encode(to_pixels(frames)[None]).mean[0]
    torch.testing.assert_close(stored.latents, mean, rtol=1e-2, atol=1e-2)  # bf16
    assert (row["frames"], row["height"], row["width"], row["fps"]) == (FRAMES, 16, 16, 8.0)


def test_token_ids_are_those_of_the_captions(road: Road) -> None:
    catalogue = load_catalogue(road.latents)
    row = catalogue.table.to_pylist()[0]
    reader = ShardReader()
    stored = decode_sample(payload(reader, road.latents, row))
    meta = json.loads(
        reader.read(road.latents / row["shard"], Span(row["meta_offset"], row["meta_size"]))
    )
    ids = Tokenizer(small_text().text)([meta["captions"]["short"]])[0]
    assert stored.text["short"].tolist() == ids.tolist()
    assert {"short", "dense"} <= set(stored.text)
    assert meta["truth"]["family"] == row["family"]


def test_statistics_belong_to_the_vae(road: Road, tmp_path: Path) -> None:
    train = read_manifest(road.latents)
    encode_shards(road.vae, road.val, tmp_path / "val", small_text())
    val = read_manifest(tmp_path / "val")
    assert (val.mean, val.std, val.vae_hash) == (train.mean, train.std, train.vae_hash)
    loaded = load_vae(road.vae)
    assert train.vae_hash == vae_hash(loaded.vae.state_dict(), loaded.vae.config)
    assert train.num_samples == 12 and val.num_samples == 8


def test_a_killed_encode_goes_on_and_gives_the_same_bytes(
    road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, written = encode.ShardEncoder.write, []

    def write_two(self: encode.ShardEncoder, path: Path, *rest: Any) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return original(self, path, *rest)

    out = tmp_path / "latents"
    monkeypatch.setattr(encode.ShardEncoder, "write", write_two)
    with pytest.raises(KeyboardInterrupt):
        encode_shards(road.vae, road.pixels, out, small_text())
    assert not out.exists()
    monkeypatch.setattr(encode.ShardEncoder, "write", original)
    report = encode_shards(road.vae, road.pixels, out, small_text())
    assert (report.own_shards, report.num_shards, report.num_samples) == (2, 4, 12)
    for shard in sorted(road.latents.glob("*.tar")):
        assert (out / shard.name).read_bytes() == shard.read_bytes()
    again = encode_shards(road.vae, road.pixels, out, small_text())
    assert again == replace(report, own_shards=0)


def test_other_content_is_not_overwritten(road: Road, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        encode_shards(road.vae, road.pixels, out, small_text())
    assert (out / "notes.txt").read_text() == "mine"


def test_a_bucket_that_nothing_fits(road: Road, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="64x64"):
        encode_shards(road.vae, road.pixels, tmp_path / "x", replace(small_text(), size=(64, 64)))
    with pytest.raises(ValueError, match="frames"):
        encode_shards(road.vae, road.pixels, tmp_path / "x", replace(small_text(), frames=4))


def test_statistics_of_another_vae_are_refused(road: Road, tmp_path: Path) -> None:
    other = write_vae_run(tmp_path / "vae", road.pixels, "vae.base_dim=4")
    options = replace(small_text(), stats_from=road.latents)
    with pytest.raises(ValueError, match="statistics of one do not fit"):
        encode_shards(other, road.pixels, tmp_path / "x", options)


def test_without_training_data_statistics_come_from_latents(road: Road, tmp_path: Path) -> None:
    moved = tmp_path / "gone"
    pixels = write_world(moved)
    vae = write_vae_run(tmp_path / "vae", pixels)
    encode_shards(vae, pixels, tmp_path / "first", small_text())
    for kept in vae.glob("latent_stats-*"):
        kept.unlink()
    shutil.rmtree(moved)
    with pytest.raises(ValueError, match="--stats-from"):
        encode_shards(vae, road.val, tmp_path / "second", small_text())
    options = replace(small_text(), stats_from=tmp_path / "first")
    encode_shards(vae, road.val, tmp_path / "second", options)
    assert read_manifest(tmp_path / "second").mean == read_manifest(tmp_path / "first").mean


@pytest.mark.parametrize(("damaged", "readable"), [(4, 0), (3, 3)])
def test_statistics_of_too_few_clips_are_refused(
    road: Road, tmp_path: Path, damaged: int, readable: int
) -> None:
    pixels = tmp_path / "pixels"
    shutil.copytree(road.pixels, pixels)
    vae = write_vae_run(tmp_path / "vae", pixels)
    for shard in sorted(pixels.glob("*.tar"))[:damaged]:
        damage(shard, 3)
    with pytest.raises(ValueError, match=rf"over 12 clips .* only {readable} can be read"):
        encode_shards(vae, road.val, tmp_path / "out", small_text())
    assert not list(vae.glob("latent_stats-*")) and not (tmp_path / "out").exists()


def test_statistics_of_some_clips_say_of_how_many(road: Road, tmp_path: Path) -> None:
    pixels = tmp_path / "pixels"
    shutil.copytree(road.pixels, pixels)
    vae = write_vae_run(tmp_path / "vae", pixels)
    damage(sorted(pixels.glob("*.tar"))[0], 2)
    encode_shards(vae, road.val, tmp_path / "out", small_text())
    assert read_manifest(tmp_path / "out").stats_clips == 10
    (kept,) = vae.glob("latent_stats-*")
    fields = json.loads(kept.read_text())
    kept.write_text(json.dumps({**fields, "std": [1e-6] * 4, "num_clips": 0}))
    encode_shards(vae, road.val, tmp_path / "again", small_text())
    assert read_manifest(tmp_path / "again") == replace(
        read_manifest(tmp_path / "out"), versions=read_manifest(tmp_path / "again").versions
    )
    assert json.loads(kept.read_text()) == fields


def test_a_damaged_clip_is_counted(road: Road, tmp_path: Path) -> None:
    pixels = tmp_path / "pixels"
    shutil.copytree(road.pixels, pixels)
    shard = sorted(pixels.glob("*.tar"))[1]
    damage(shard, 1)
    report = encode_shards(road.vae, pixels, tmp_path / "out", small_text())
    assert (report.num_samples, report.num_skipped) == (11, 1)
    skipped = [json.loads(x) for x in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert skipped[0]["key"] == scan_shard(shard)[0].key and skipped[0]["reason"]


def damage(shard: Path, count: int) -> None:
    """Flip a byte in the videos of the first clips of a shard."""
    data = bytearray(shard.read_bytes())
    for sample in scan_shard(shard)[:count]:
        span = sample.members["mp4"]
        data[span.offset + span.size // 2] ^= 255
    shard.write_bytes(data)


def payload(reader: ShardReader, folder: Path, row: dict) -> bytes:
    return reader.read(folder / row["shard"], Span(row["payload_offset"], row["payload_size"]))
