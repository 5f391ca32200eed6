"""What an encode stores beside central cuts: variants, segments, log variances; and what never."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longtake.data.catalogue import Catalogue, load_catalogue
from longtake.data.decode import decode_clip
from longtake.data.latents import LatentSample, decode_sample, read_manifest
from longtake.data.loader import Loader
from longtake.data.plan import BucketConfig, DataConfig, DatasetConfig, Plan
from longtake.data.shards import ShardReader, Span
from longtake.data.transforms import crop_clip, to_float
from longtake.models.vae import Posterior
from longtake.models.vae_bounded import encode_bounded
from longtake.train import encode_shard
from longtake.train.encode import encode_shards, forecast_encode
from longtake.train.encode_plan import plan_encode
from longtake.train.runs import load_vae

from .conftest import Road, small_text
from .small_runs import write_world

SEGMENTS = ("last", "suffix:3", "every:2")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips with room around the VAE's bucket, in time and in space."""
    return write_world(tmp_path_factory.mktemp("wide") / "world", num_clips=4, frames=9, width=32)


def stored(latents: Catalogue, row: dict) -> tuple[LatentSample, dict]:
    folder, reader = Path(str(latents.root)), ShardReader()
    spans = (Span(row[f"{part}_offset"], row[f"{part}_size"]) for part in ("payload", "meta"))
    payload, meta = (reader.read(folder / row["shard"], span) for span in spans)
    return decode_sample(payload), json.loads(meta)


def test_variants_and_segments(road: Road, wide: Path, tmp_path: Path) -> None:
    options = replace(small_text(), variants=3, segments=SEGMENTS, logvar=True)
    expected = forecast_encode(road.vae, wide, options)
    report = encode_shards(road.vae, wide, tmp_path / "latents", options)
    latents, vae = load_catalogue(tmp_path / "latents"), load_vae(road.vae).vae
    assert (expected.clips, expected.samples) == (4, 12) and report.num_samples == 12
    pixels = {row["key"]: row for row in load_catalogue(wide).table.to_pylist()}
    rows, size = latents.table.to_pylist(), 0
    assert len({row["sample_id"] for row in rows}) == 12
    assert [row["variant"] for row in rows] == [0, 1, 2] * 4
    for row in rows:
        sample, meta = stored(latents, row)
        source = pixels[row["key"].partition("~")[0]]
        assert row["source_id"] == source["source_id"]
        cut = meta["variant"]
        data = ShardReader().read(
            wide / source["shard"], Span(source["payload_offset"], source["payload_size"])
        )
        frames = decode_clip(data, cut["times"], size=(16, 32))
        assert (cut["crop"] == [0.5, 0.5]) == (row["variant"] == 0)
        clip = to_float(crop_clip(frames, 16, 16, tuple(cut["crop"])))[None]
        with torch.no_grad():
            whole, last = vae.encode(clip), vae.encode(clip[:, :, -1:]).mean[0]
            stills = torch.cat([vae.encode(clip[:, :, [t]]).mean[0] for t in (0, 2, 4)], 1)
            suffix = vae.encode(clip[:, :, -3:]).mean[0]
        assert sample.logvar is not None and set(sample.segments) == set(SEGMENTS)
        for found, wanted in (
            (sample.latents, whole.mean[0]),
            (sample.logvar, whole.logvar[0]),
            (sample.segments["last"].latents, last),
            (sample.segments["every:2"].latents, stills),
            (sample.segments["suffix:3"].latents, suffix),
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)  # bf16
            size += found.numel() * 2
        places = {name: segment.places for name, segment in sample.segments.items()}
        assert places == {"last": (2,), "suffix:3": (1, 2), "every:2": (0, 1, 2)}
        assert not torch.allclose(whole.mean[0, :, -1:], last, atol=0.1)  # it saw what came before
    assert expected.latents == size
    on_disk = sum(path.stat().st_size for path in (tmp_path / "latents").glob("*.tar"))
    assert abs(expected.whole / on_disk - 1) < 0.3  # tars this small are half padding
    read_by_the_loader(tmp_path / "latents")


def read_by_the_loader(folder: Path) -> None:
    """Batches hold the segments."""
    manifest = read_manifest(folder)
    assert (manifest.segments, manifest.variants, manifest.logvar) == (SEGMENTS, 3, True)
    datasets = [DatasetConfig(str(folder), where="variant > 0")]
    data = DataConfig(datasets, buckets=[BucketConfig(5, 16, 16, 4)], micro_batches_per_step=2)
    plan = Plan.from_config(data, 0)
    assert plan.num_samples == 8
    (batch, _) = next(iter(Loader(plan, range(2))))
    last = batch.clips[0].segment("last")
    assert last.latents.shape == (4, 1, 8, 8) and last.places == (2,)


def test_clips_without_room_have_one_variant(road: Road) -> None:
    expected = forecast_encode(road.vae, road.pixels, replace(small_text(), variants=3))
    assert (expected.clips, expected.samples, expected.shards) == (12, 12, 4)


def test_segments_that_the_clips_cannot_have(road: Road, tmp_path: Path) -> None:
    for name, message in (("suffix:4", r"1 \+ 2·k"), ("every:6", "clips of 5 frames")):
        with pytest.raises(ValueError, match=message):
            options = replace(small_text(), segments=(name,))
            encode_shards(road.vae, road.pixels, tmp_path / "x", options)
    assert not list(tmp_path.iterdir())


def test_clips_have_the_segments_that_they_are_long_enough_for(road: Road) -> None:
    loaded = load_vae(road.vae)
    buckets = [BucketConfig(frames, 16, 16, 2) for frames in (1, 5, 9)]
    config = replace(loaded.config, data=replace(loaded.config.data, buckets=buckets))
    options = replace(small_text(), segments=("last", "suffix:5"))
    plan = plan_encode(replace(loaded, config=config), road.pixels, options)
    names = {n: [segment.name for segment in plan.segments_of(n)] for n in (1, 5, 9)}
    assert names == {1: [], 5: ["last"], 9: ["last", "suffix:5"]}


def test_latents_that_are_not_finite_are_counted(
    road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def spoil(vae: torch.nn.Module, x: torch.Tensor) -> Posterior:
        nonlocal calls
        calls += 1
        posterior = encode_bounded(vae, x)  # type: ignore[arg-type]
        if calls == 2:
            posterior.mean[1, 0, 0, 0, 0] = torch.inf
        return posterior

    monkeypatch.setattr(encode_shard, "encode_bounded", spoil)
    report = encode_shards(road.vae, road.pixels, tmp_path / "out", small_text())
    assert (report.num_samples, report.num_skipped) == (11, 1)
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    (skipped,) = [json.loads(line) for line in lines]
    assert skipped["reason"] == "latents has values that are not finite"
    missing = {row["key"] for row in load_catalogue(road.latents).table.to_pylist()}
    missing -= {row["key"] for row in load_catalogue(tmp_path / "out").table.to_pylist()}
    assert missing == {skipped["key"]}
