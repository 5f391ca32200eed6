import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from longtake.data.catalogue import Catalogue, build_catalogue, load_catalogue
from longtake.data.config import BucketConfig, DataConfig, DatasetConfig
from longtake.data.decode import encode_image
from longtake.data.loader import Batch, Loader, read_batches
from longtake.data.plan import Plan
from longtake.data.plan.planned import Exclusion
from longtake.data.plan.val_plan import ValPlan
from longtake.data.transforms import to_uint8
from tests.data.toy import toy_dataset, toy_frames, toy_meta, toy_video, write_shards


def loader_config(
    folder: Path, *buckets: BucketConfig, slots: int = 4, **options: object
) -> DataConfig:
    config = DataConfig(
        train=[DatasetConfig(str(folder), captions={"dense": 0.5, "short": 0.5})],
        val=[DatasetConfig(str(folder))],
        buckets=list(buckets) or [BucketConfig(9, 32, 32, 2)],
        micro_batches_per_step=slots,
        decode_timeout=None,  # a child to decode in takes a second to start
    )
    return replace(config, **options)  # type: ignore[arg-type]


def flip_payload(catalogue: Catalogue, key: str, column: str = "payload") -> None:
    """Change one byte of a member inside its shard, as a failing disk or a later edit would."""
    row = next(r for r in catalogue.table.to_pylist() if r["key"] == key)
    path = catalogue.root / row["shard"]
    data = bytearray(path.read_bytes())
    data[row[f"{column}_offset"] + row[f"{column}_size"] // 2] ^= 0x55
    path.write_bytes(data)


def content_of(steps: Sequence[list[Batch]]) -> list[object]:
    return [
        (
            batch.step,
            batch.slot,
            batch.excluded,
            [(c.sample, c.caption, c.fps, c.truth) for c in batch.clips],
            batch.stack_video().numpy().tobytes(),
        )
        for batches in steps
        for batch in batches
    ]


def load(plan: Plan, count: int, **options: object) -> list[list[Batch]]:
    slots = options.pop("slots", range(plan.num_slots))
    return list(islice(Loader(plan, slots, **options), count))  # type: ignore[arg-type]


def test_batches_hold_what_was_planned(tmp_path: Path) -> None:
    toy_dataset(tmp_path)
    plan = Plan.from_config(loader_config(tmp_path), 1)
    for step, batches in enumerate(load(plan, 3)):
        assert [b.slot for b in batches] == [0, 1, 2, 3]
        for batch, planned in zip(batches, plan.step(step), strict=True):
            assert [clip.sample for clip in batch.clips] == planned.samples
            video = batch.stack_video()
            assert video.shape == (2, 3, 9, 32, 32) and video.dtype == torch.float32
            assert -1 <= video.min() < video.max() <= 1
            for clip, pixels in zip(batch.clips, video, strict=True):
                index = int(clip.sample.key[-4:])
                kind = {"dense": f"square number {index} moves right", "short": f"square {index}"}
                assert clip.caption == kind[clip.sample.caption_kind] and clip.fps == 8
                truth = toy_frames(index).astype(float)  # (T, H, W, 3)
                decoded = to_uint8(pixels).permute(1, 2, 3, 0).numpy()
                assert np.sqrt(np.mean((truth - decoded) ** 2)) < 255 / 100  # 40 dB
            with pytest.raises(ValueError, match="without latents"):
                batch.stack_latents()


def test_workers_ranks_and_start_change_nothing(tmp_path: Path) -> None:
    catalogue = toy_dataset(tmp_path)
    flip_payload(catalogue, "clip0005")
    flip_payload(catalogue, "clip0011", "meta")
    plan = Plan.from_config(loader_config(tmp_path, crop="random"), 7)
    reference = load(plan, 6)
    assert {e.sample_id for s in reference for b in s for e in b.excluded}, "no bad sample met"
    for workers in (1, 2):
        assert content_of(load(plan, 6, num_workers=workers)) == content_of(reference), workers
    halves = [
        load(plan, 6, slots=range(2), num_workers=1),
        load(plan, 6, slots=range(2, 4)),
    ]
    joined = [one + two for one, two in zip(*halves, strict=True)]
    assert content_of(joined) == content_of(reference)
    assert content_of(load(plan, 3, start_step=3, num_workers=2)) == content_of(reference[3:])


def test_flips_are_off_by_default_and_mirror_half_of_the_clips(tmp_path: Path) -> None:
    toy_dataset(tmp_path)
    plain, flipped = (
        load(Plan.from_config(loader_config(tmp_path, **options), 5), 6)
        for options in ({}, {"flip": True})
    )
    mirrored = 0
    for one, two in zip(plain, flipped, strict=True):
        for old, new in zip(one, two, strict=True):
            for a, b in zip(old.clips, new.clips, strict=True):
                assert a.video is not None and b.video is not None and not a.sample.flip
                expected = a.video.flip(-1) if b.sample.flip else a.video
                assert torch.equal(b.video, expected)
                mirrored += b.sample.flip
    assert 12 <= mirrored <= 36  # of 48


def test_bad_samples_are_replaced_in_place_and_reported(tmp_path: Path) -> None:
    catalogue = toy_dataset(tmp_path)
    bad = {"clip0002": "payload", "clip0013": "meta"}
    plan = Plan.from_config(loader_config(tmp_path), 3)
    clean = load(plan, 6)
    for key, member in bad.items():
        flip_payload(catalogue, key, member)
    damaged = load(plan, 6)
    replaced = 0
    for before, after in zip(clean, damaged, strict=True):
        for old, new in zip(before, after, strict=True):
            for one, two in zip(old.clips, new.clips, strict=True):
                if one.sample.key in bad:
                    replaced += 1
                    assert two.sample.key not in bad
                    assert two.sample.replaces == one.sample.sample_id
                else:
                    assert one.sample == two.sample
                    assert torch.equal(one.video, two.video)  # type: ignore[arg-type]
    assert replaced == 4  # two visits in six steps of eight
    found = [e for batches in damaged for b in batches for e in b.excluded]
    reasons = {e.reason for e in found}
    assert reasons == {
        "clip0002: payload changed after indexing (xxh3 differs)",
        "clip0013: json changed after indexing (xxh3 differs)",
    }
    # Known from the start (a resumed run), they give the same batches and no new report.
    first = {e.sample_id: e for e in reversed(found)}
    resumed = load(plan, 6, exclusions=list(first.values()))
    assert not [e for batches in resumed for b in batches for e in b.excluded]
    for one, two in zip(damaged, resumed, strict=True):
        for old, new in zip(one, two, strict=True):
            assert [c.sample for c in old.clips] == [c.sample for c in new.clips]
            assert torch.equal(old.stack_video(), new.stack_video())


def test_damage_that_the_hash_cannot_know_is_a_decode_error(tmp_path: Path) -> None:
    """A clip that probes well but does not decode: its frames were damaged before indexing."""
    samples = []
    for index in range(12):
        data = bytearray(toy_video(index))
        if index == 4:
            start = data.find(b"mdat") + 800  # behind the encoder's own text
            data[start : start + 200] = bytes(200)
        samples.append((f"c{index:02d}", {"mp4": bytes(data), "json": toy_meta(index)}))
    catalogue = build_catalogue(write_shards(tmp_path, samples, 4), progress=False)
    keys = catalogue.table.column("key").to_pylist()
    plan = Plan.from_config(loader_config(tmp_path, slots=2), 0)
    loaded = load(plan, 6)
    used = {c.sample.key for batches in loaded for b in batches for c in b.clips}
    reported = {e.reason.split(":")[0] for batches in loaded for b in batches for e in b.excluded}
    assert "c04" not in used and (reported == {"c04"} or "c04" not in keys)


def test_a_caption_kind_that_vanished_and_caption_not_utf8(tmp_path: Path) -> None:
    samples = [(f"c{i}", {"mp4": toy_video(i), "json": toy_meta(i)}) for i in range(8)]
    samples.append(("latin1", {"mp4": toy_video(8), "txt": "été".encode("latin-1")}))
    catalogue = build_catalogue(write_shards(tmp_path, samples), progress=False)
    assert [r["key"] for r in catalogue.rejected] == ["latin1"]
    plan = Plan.from_config(loader_config(tmp_path, slots=2), 0)
    assert "rejected when indexing: 1" in plan.summary()
    assert all(c.sample.key != "latin1" for s in load(plan, 4) for b in s for c in b.clips)


def test_when_all_is_bad_the_error_says_so(tmp_path: Path) -> None:
    catalogue = toy_dataset(tmp_path, 8)
    for key in catalogue.table.column("key").to_pylist():
        flip_payload(catalogue, key)
    plan = Plan.from_config(loader_config(tmp_path, slots=2), 0)
    with pytest.raises(ValueError, match="no replacement is left for sample"):
        load(plan, 1)


def test_clips_are_resized_and_cropped_to_their_bucket(tmp_path: Path) -> None:
    samples = [
        (f"wide{i}", {"mp4": toy_video(i, 9, 64, 128), "json": toy_meta(i)}) for i in range(4)
    ]
    samples += [
        (f"tall{i}", {"mp4": toy_video(i, 9, 96, 48), "json": toy_meta(i)}) for i in range(4)
    ]
    samples += [
        (f"image{i}", {"png": encode_image(toy_frames(i, 1)[0]), "json": toy_meta(i)})
        for i in range(4)
    ]
    build_catalogue(write_shards(tmp_path, samples), progress=False)
    shapes = [BucketConfig(9, 32, 64, 1), BucketConfig(5, 40, 24, 1), BucketConfig(1, 32, 32, 2)]
    plan = Plan.from_config(loader_config(tmp_path, *shapes, slots=2, crop="random"), 0)
    seen = set()
    for batches in load(plan, 8):
        for batch in batches:
            seen.add(tuple(batch.stack_video().shape))
    assert seen == {(1, 3, 9, 32, 64), (1, 3, 5, 40, 24), (2, 3, 1, 32, 32)}


def test_truth_and_exclusions_reach_the_batch(tmp_path: Path) -> None:
    samples = [
        (f"c{i}", {"mp4": toy_video(i), "json": toy_meta(i, truth={"number": i})}) for i in range(8)
    ]
    build_catalogue(write_shards(tmp_path, samples), progress=False)
    plan = Plan.from_config(loader_config(tmp_path, slots=2), 0)
    batch = load(plan, 1)[0][0]
    assert [c.truth for c in batch.clips] == [
        {"number": int(c.sample.key[1:])} for c in batch.clips
    ]
    gone = Exclusion(batch.clips[0].sample.sample_id, 0, "quarantined")
    again = load(plan, 1, exclusions=[gone])[0][0]
    assert again.clips[0].sample.replaces == gone.sample_id and not again.excluded


def test_validation_leaves_bad_samples_out_at_any_world_size(tmp_path: Path) -> None:
    catalogue = toy_dataset(tmp_path, 16)
    flip_payload(catalogue, "clip0003")
    config = loader_config(tmp_path)
    plan = ValPlan.from_config(config, 0, 12)
    outcomes = []
    for world in (1, 2, 3):
        clips, excluded = {}, []
        for rank in range(world):
            batches = plan.micro_batches(rank, world)
            for batch in read_batches(plan.tables, plan.config, batches):
                if batch.counted:
                    excluded += [e.sample_id for e in batch.excluded]
                    clips |= {
                        c.sample.key: int(c.video.sum()) for c in batch.clips if c.video is not None
                    }
        assert len(clips) == 11 and len(excluded) == 1
        outcomes.append(clips)
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_a_shard_that_shrank_is_refused_at_the_start(tmp_path: Path) -> None:
    toy_dataset(tmp_path)
    path = tmp_path / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-1024])
    with pytest.raises(ValueError, match=r"shard-000001\.tar: .* changed after indexing"):
        Plan.from_config(loader_config(tmp_path), 0)
    manifest = json.loads((tmp_path / "catalogue" / "manifest.json").read_text())
    assert manifest["shards"]["shard-000001.tar"]["samples"] == 8


def test_decord_loads_the_same_clips(tmp_path: Path) -> None:
    pytest.importorskip("decord")
    toy_dataset(tmp_path, 8)
    one = load(Plan.from_config(loader_config(tmp_path, slots=2), 0), 1)[0][0]
    config = loader_config(tmp_path, slots=2, decoder="decord")
    assert load_catalogue(tmp_path).table.num_rows == 8
    two = load(Plan.from_config(config, 0), 1)[0][0]
    assert [c.sample for c in one.clips] == [c.sample for c in two.clips]
    assert (one.stack_video() - two.stack_video()).square().mean().sqrt() < 0.03


def test_a_validation_batch_without_a_readable_clip_still_runs(tmp_path: Path) -> None:
    """The ranks must run their models equally often; the stand-in counts for nothing."""
    catalogue = toy_dataset(tmp_path, 16)
    flip_payload(catalogue, "clip0000")
    config = loader_config(tmp_path, BucketConfig(9, 32, 32, 1))
    plan = ValPlan.from_config(config, 0, 6)
    batches = list(read_batches(plan.tables, plan.config, plan.micro_batches(0, 1)))
    assert len(batches) == 6 and all(batch.clips for batch in batches)
    (lost,) = [batch for batch in batches if not batch.counted]
    assert len(lost.excluded) == 1
    for key in [f"clip{index:04d}" for index in range(1, 16)]:
        flip_payload(catalogue, key)
    with pytest.raises(ValueError, match="no sample can be read"):
        list(read_batches(plan.tables, plan.config, plan.micro_batches(0, 1)))
