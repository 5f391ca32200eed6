import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from longtake.data.catalogue import Catalogue, build_catalogue, load_catalogue
from longtake.data.latents import (
    ChannelStats,
    LatentManifest,
    LatentSample,
    LatentWriter,
    TextCache,
    decode_sample,
    read_empty_text,
    read_manifest,
    refuse_missing_segments,
    refuse_other_vae,
    write_manifest,
)
from longtake.data.loader import Batch, Loader
from longtake.data.plan import BucketConfig, DataConfig, DatasetConfig, Plan
from longtake.data.samples import SampleError
from longtake.data.segments import Segment, SegmentSpec
from tests.data.toy import toy_meta, toy_video, write_shards

TOKENS = TextCache("tokens", "hash-of-tokenizer", 48)


def _meta(index: int, frames: int = 9) -> dict[str, object]:
    captions = {"dense": f"dense {index}", "short": f"short {index}"}
    size = {"frames": frames, "height": 32, "width": 32, "fps": 8.0}
    return {"captions": captions, **size, "split": "train", "truth": {"n": index}}


def _latents(index: int) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(4, 3, 8, 8, generator=generator) * 3 + torch.arange(4).view(4, 1, 1, 1)


def _manifest(text: TextCache = TOKENS, **fields: Any) -> LatentManifest:
    return LatentManifest("vae-a", 4, [0.0] * 4, [1.0] * 4, (4, 4, 4), text, **fields)


def _write(folder: Path, count: int = 16, text: TextCache = TOKENS) -> Catalogue:
    folder.mkdir(parents=True, exist_ok=True)
    stats = ChannelStats(4)
    for start in range(0, count, 5):
        with LatentWriter(folder / f"shard-{start:06d}.tar", _manifest(text)) as writer:
            for index in range(start, min(start + 5, count)):
                row = torch.arange(index % 5 + 2)
                if text.kind == "embeddings":
                    row = torch.full((index % 5 + 2, 6), float(index))
                cached: dict[str, Tensor] = dict.fromkeys(("dense", "short"), row)
                stats.update(_latents(index).bfloat16())
                sample = LatentSample(_latents(index), cached)
                writer.write(f"clip{index:03d}", sample, _meta(index))
    manifest = replace(_manifest(text), mean=stats.mean, std=stats.std, num_samples=count)
    write_manifest(folder, manifest, torch.zeros(1, 6))
    return build_catalogue(folder, progress=False)


def _plan(folder: Path, *buckets: BucketConfig) -> Plan:
    config = DataConfig(
        train=[DatasetConfig(str(folder), captions={"dense": 1.0, "short": 1.0})],
        buckets=list(buckets) or [BucketConfig(9, 32, 32, 2)],
        micro_batches_per_step=2,
    )
    return Plan.from_config(config, 0)


def _load(plan: Plan, count: int, num_workers: int = 0) -> list[Batch]:
    steps = islice(Loader(plan, range(2), num_workers=num_workers), count)
    return [batch for batches in steps for batch in batches]


def test_catalogue_and_manifest_of_latents(tmp_path: Path) -> None:
    catalogue = _write(tmp_path / "latents")
    row = catalogue.table.to_pylist()[3]
    assert (row["frames"], row["height"], row["width"], row["fps"]) == (9, 32, 32, 8)
    assert (row["lt"], row["lh"], row["lw"], row["ext"]) == (3, 8, 8, "safetensors")
    manifest = read_manifest(tmp_path / "latents")
    assert (manifest.vae_hash, manifest.num_samples, manifest.text) == ("vae-a", 16, TOKENS)
    everything = torch.stack([_latents(i).bfloat16().float() for i in range(16)])
    mean, std = everything.mean((0, 2, 3, 4)), everything.std((0, 2, 3, 4), correction=0)
    assert torch.allclose(torch.tensor(manifest.mean), mean, atol=1e-5)
    assert torch.allclose(torch.tensor(manifest.std), std, atol=1e-5)


@pytest.mark.parametrize("kind", ["tokens", "embeddings"])
def test_round_trip_through_plan_and_loader(tmp_path: Path, kind: str) -> None:
    _write(tmp_path, text=TextCache(kind, "h", 48))
    plan = _plan(tmp_path)
    loaded = _load(plan, 4)
    values = []
    for batch in loaded:
        assert batch.stack_latents().shape == (2, 4, 3, 8, 8)
        values.append(batch.stack_latents())
        manifest = read_manifest(tmp_path)
        for clip in batch.clips:
            index = int(clip.sample.key[-3:])
            mean, std = (torch.tensor(v).view(4, 1, 1, 1) for v in (manifest.mean, manifest.std))
            expected = (_latents(index).bfloat16().float() - mean) / std
            assert clip.latents is not None and torch.allclose(clip.latents, expected, atol=1e-5)
            assert clip.caption == f"{clip.sample.caption_kind} {index}"
            assert clip.truth == {"n": index} and clip.fps == 8 and clip.video is None
            assert clip.text is not None
            if kind == "tokens":
                assert clip.text.dtype == torch.int64
                assert clip.text.tolist() == list(range(index % 5 + 2))
            else:
                assert torch.equal(clip.text.float(), torch.full((index % 5 + 2, 6), float(index)))
    assert abs(torch.cat(values).mean()) < 0.05 and abs(torch.cat(values).std() - 1) < 0.05
    with pytest.raises(ValueError, match="without video"):
        loaded[0].stack_video()
    for one, two in zip(loaded, _load(plan, 4, num_workers=2), strict=True):
        assert torch.equal(one.stack_latents(), two.stack_latents())
        for a, b in zip(one.clips, two.clips, strict=True):
            assert a.sample == b.sample
            assert torch.equal(a.text, b.text)  # type: ignore[arg-type]


def test_latents_of_another_vae_are_refused_with_both_hashes(tmp_path: Path) -> None:
    _write(tmp_path)
    manifest = read_manifest(tmp_path)
    refuse_other_vae(manifest, "vae-a")
    with pytest.raises(ValueError, match=r"VAE vae-a.*VAE vae-b.*longtake encode"):
        refuse_other_vae(manifest, "vae-b")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_tar_of_another_vae_stops_the_run_with_both_hashes(
    tmp_path: Path, num_workers: int
) -> None:
    _write(tmp_path)
    with LatentWriter(
        tmp_path / "shard-000005.tar", replace(_manifest(), vae_hash="vae-b")
    ) as writer:
        for index in range(5, 10):
            cached: dict[str, Tensor] = dict.fromkeys(("dense", "short"), torch.arange(3))
            writer.write(f"clip{index:03d}", LatentSample(_latents(index), cached), _meta(index))
    build_catalogue(tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"shard-000005\.tar: clip00.* VAE vae-b, .* VAE vae-a;"):
        _load(_plan(tmp_path), 8, num_workers)


def test_latents_whose_json_names_no_vae_are_read(tmp_path: Path) -> None:
    _write(tmp_path / "new", 2)
    tensors = {"latents": _latents(0).bfloat16(), "text.dense": torch.arange(3)}
    meta = {**_meta(0), "captions": {"dense": "old"}}
    members = {"safetensors": save(tensors), "json": json.dumps(meta).encode()}
    folder = write_shards(tmp_path / "old", [(f"c{i}", members) for i in range(8)])
    shutil.copy(tmp_path / "new" / "latents.json", folder)
    build_catalogue(folder, progress=False)
    assert not any(batch.excluded for batch in _load(_plan(folder), 2))


def test_a_bucket_that_was_not_encoded_names_the_command(tmp_path: Path) -> None:
    _write(tmp_path)
    with pytest.raises(ValueError, match=r"17x32x32 can never fill: 0 samples.*longtake encode"):
        _plan(tmp_path, BucketConfig(9, 32, 32, 2), BucketConfig(17, 32, 32, 1))
    with pytest.raises(ValueError, match="longtake encode"):
        _plan(tmp_path, BucketConfig(9, 64, 64, 2))


def test_captions_without_cached_text_are_never_planned(tmp_path: Path) -> None:
    with LatentWriter(tmp_path / "s.tar", _manifest()) as writer:
        for index in range(8):
            sample = LatentSample(_latents(index), {"dense": torch.arange(3)})
            writer.write(f"c{index}", sample, _meta(index))
        with pytest.raises(SampleError, match="caption missing"):
            writer.write("none", LatentSample(_latents(0), {"zh": torch.arange(3)}), _meta(0))
    write_manifest(tmp_path, _manifest())
    build_catalogue(tmp_path, progress=False)
    for batch in _load(_plan(tmp_path), 4):
        assert {c.sample.caption_kind for c in batch.clips} == {"dense"} and not batch.excluded


def test_cached_text_that_is_missing_is_a_bad_sample(tmp_path: Path) -> None:
    """Shards of another writer, whose captions promise more than the tensors hold."""
    _write(tmp_path / "whole", 8)
    tensors = {"latents": _latents(0).bfloat16(), "text.dense": torch.arange(3)}
    members = {"safetensors": save(tensors), "json": json.dumps(_meta(0)).encode()}
    folder = write_shards(tmp_path / "poor", [(f"c{i}", members) for i in range(8)])
    shutil.copy(tmp_path / "whole" / "latents.json", folder)
    build_catalogue(folder, progress=False)
    plan = _plan(folder)
    kinds = [sample.caption_kind for k in range(4) for b in plan.step(k) for sample in b.samples]
    assert {"dense", "short"} == set(kinds)
    reports = [e.reason for batch in _load(plan, 1) for e in batch.excluded]
    assert len(reports) >= kinds[:4].count("short") > 0
    assert all("text of caption kind 'short' is not cached" in reason for reason in reports)


def test_missing_and_damaged_manifests(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"latents\.json: missing; make latents with"):
        read_manifest(tmp_path)
    _write(tmp_path)
    path = tmp_path / "latents.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "mean": [0.0]}))
    with pytest.raises(ValueError, match="must have z_dim=4 values"):
        read_manifest(tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        read_manifest(tmp_path)


def test_writer_refuses_what_cannot_be_trained_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text\.kind='words'"):
        write_manifest(tmp_path, _manifest(TextCache("words", "h", 1)))
    with pytest.raises(ValueError, match="needs empty_text"):
        write_manifest(tmp_path, _manifest(TextCache("embeddings", "h", 1)))
    words = {"dense": torch.arange(2)}
    nan, short = _latents(0), Segment(torch.zeros(3, 1, 8, 8), (2,))
    nan[1, 2, 3, 4] = torch.nan
    sample = LatentSample(_latents(0), words)
    with LatentWriter(tmp_path / "a.tar", _manifest()) as writer:
        with pytest.raises(ValueError, match=r"must be \(4, T, H, W\)"):
            writer.write("k", LatentSample(torch.zeros(3, 1, 2, 2), words), _meta(0))
        with pytest.raises(ValueError, match=r"segment\.last of shape"):
            writer.write("k", replace(sample, segments={"last": short}), _meta(0))
        with pytest.raises(SampleError, match="latents has values that are not finite"):
            writer.write("k", replace(sample, latents=nan), _meta(0))
        with pytest.raises(SampleError, match="logvar has values that are not finite"):
            writer.write("k", replace(sample, logvar=nan), _meta(0))
        incomplete = {k: v for k, v in _meta(0).items() if k != "frames"}
        with pytest.raises(SampleError, match="frames in the json"):
            writer.write("k", sample, incomplete)
    assert not list(tmp_path.iterdir())  # no sample, no tar


def test_segments_and_logvar_come_back_normalised(tmp_path: Path) -> None:
    manifest = _manifest(segments=("last", "every:4"), logvar=True)
    manifest = replace(manifest, mean=[1.0] * 4, std=[2.0] * 4)
    with LatentWriter(tmp_path / "s.tar", manifest) as writer:
        for index in range(8):
            segments = {
                "last": Segment(torch.full((4, 1, 8, 8), float(index)), (2,)),
                "every:4": Segment(torch.full((4, 3, 8, 8), 5.0), (0, 1, 2)),
            }
            rows = {"dense": torch.arange(3), "short": torch.arange(2)}
            meta = {**_meta(index), "variant": {"index": index % 2}}
            logvar = torch.full((4, 3, 8, 8), -float(index))
            writer.write(f"c{index}", LatentSample(_latents(index), rows, logvar, segments), meta)
    write_manifest(tmp_path, manifest)
    catalogue = build_catalogue(tmp_path, progress=False)
    assert catalogue.table["variant"].to_pylist() == [0, 1] * 4
    assert catalogue.filter("variant = 0").kept == 4
    refuse_missing_segments(read_manifest(tmp_path), ["last"], tmp_path)
    with pytest.raises(ValueError, match=r"lacks suffix:5; run .*--segments last,every:4,suffix:5"):
        refuse_missing_segments(read_manifest(tmp_path), ["last", "suffix:5"], tmp_path)
    loaded = _load(_plan(tmp_path), 2)
    for batch in loaded:
        for clip in batch.clips:
            last = clip.segment("last").at(range(2, 3))
            assert torch.equal(last, torch.full((4, 1, 8, 8), (float(clip.sample.key[1:]) - 1) / 2))
            assert clip.segment("every:4").at(range(1, 2)).shape == (4, 1, 8, 8)
            with pytest.raises(ValueError, match=r"no segment 'suffix:5'.*every:4,last,suffix:5"):
                clip.segment("suffix:5")
    for one, two in zip(loaded, _load(_plan(tmp_path), 2, num_workers=2), strict=True):
        assert one.digest == two.digest
        for ours, theirs in zip(one.clips, two.clips, strict=True):
            last = ours.segment("last"), theirs.segment("last")
            assert torch.equal(last[0].latents, last[1].latents)
            assert last[0].places == last[1].places == (2,)


def test_a_catalogue_without_the_column_of_variants_is_read(tmp_path: Path) -> None:
    _write(tmp_path, 2)
    (part,) = (tmp_path / "catalogue").glob("*.parquet")
    pq.write_table(pq.read_table(part).drop_columns("variant"), part, write_page_checksum=True)
    assert load_catalogue(tmp_path).table["variant"].to_pylist() == [None, None]


def test_a_segment_that_does_not_fit_its_latents(tmp_path: Path) -> None:
    tensors = {"latents": torch.zeros(4, 3, 8, 8), "segment.last": torch.zeros(4, 1, 8, 8)}
    for places in (None, torch.tensor([3]), torch.tensor([1, 2])):
        damaged = tensors if places is None else tensors | {"places.last": places}
        with pytest.raises(SampleError, match="segment last of shape"):
            decode_sample(save(damaged))


@pytest.mark.parametrize(
    ("name", "places"),
    [("last", (4,)), ("suffix:5", (3, 4)), ("every:4", (0, 1, 2, 3, 4)), ("every:8", (0, 2, 4))],
)
def test_segments_stand_for_the_latents_that_end_with_their_frames(
    name: str, places: tuple[int, ...]
) -> None:
    spec = SegmentSpec.parse(name)
    spec.check(17, 4)
    assert spec.places(17, 4) == places
    frames = torch.arange(17.0).view(1, 1, 17, 1, 1).expand(2, 3, 17, 1, 1)
    # A stand-in for the VAE: a latent is the last pixel frame that it covers.
    latents = spec.encode(lambda piece: piece[:, :, ::4], frames)
    assert latents.shape == (2, 3, len(places), 1, 1)
    assert latents[1, 2].flatten().tolist() == [4.0 * place for place in places]


@pytest.mark.parametrize(
    ("shown", "seen"),
    [
        ("0", [0] * 5),
        ("1", [1, 0, 0, 0, 0]),
        ("5", [1, 5, 0, 0, 0]),
        ("1+1", [1, 0, 0, 0, 17]),
        ("0+5", [0, 0, 0, 13, 17]),
    ],
)
def test_a_clip_of_which_the_ends_are_shown_is_grey_between(shown: str, seen: list[int]) -> None:
    spec = SegmentSpec.parse(f"shown:{shown}")
    spec.check(17, 4)
    assert spec.places(17, 4) == (0, 1, 2, 3, 4)
    frames = torch.arange(1.0, 18.0).view(1, 1, 17, 1, 1).expand(2, 3, 17, 1, 1)
    latents = spec.encode(lambda piece: piece[:, :, ::4], frames)
    assert latents[1, 2].flatten().tolist() == seen


@pytest.mark.parametrize(
    "name",
    [
        *("first", "suffix", "suffix:4", "every:6", "suffix:17", "every:0"),
        *("shown:4", "shown:17", "shown:1+0", "shown:1+4", "shown:9+9"),
    ],
)
def test_segments_that_a_clip_cannot_have(name: str) -> None:
    with pytest.raises(ValueError, match="segment"):
        SegmentSpec.parse(name).check(17, 4)


def test_an_interrupted_encode_is_not_taken_for_a_finished_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        with LatentWriter(tmp_path / "s.tar", _manifest()) as writer:
            writer.write("k", LatentSample(_latents(0), {"dense": torch.arange(2)}), _meta(0))
            raise KeyboardInterrupt
    assert not list(tmp_path.glob("**/*.tar*/*"))


def test_empty_text_is_kept(tmp_path: Path) -> None:
    _write(tmp_path / "e", text=TextCache("embeddings", "h", 48))
    assert torch.equal(read_empty_text(tmp_path / "e"), torch.zeros(1, 6))
    _write(tmp_path / "t")
    with pytest.raises(ValueError, match="missing"):
        read_empty_text(tmp_path / "t")


def test_damaged_latents(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="damaged"):
        decode_sample(b"\x08\0\0\0\0\0\0\0{}")
    samples = [
        ("bad", {"safetensors": b"garbage", "json": json.dumps(_meta(0)).encode()}),
        ("good", {"mp4": toy_video(0), "json": toy_meta(0)}),
    ]
    catalogue = build_catalogue(write_shards(tmp_path, samples), progress=False)
    assert "damaged" in catalogue.rejected[0]["reason"]


def test_statistics_of_nothing_are_an_error() -> None:
    for name in ("mean", "std"):
        with pytest.raises(ValueError, match="no latents were counted"):
            getattr(ChannelStats(4), name)
