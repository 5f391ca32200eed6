from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.data.catalogue import Catalogue
from longtake.data.config import CacheConfig, LengthShare
from longtake.data.plan import (
    BucketConfig,
    DataConfig,
    DatasetConfig,
    Exclusion,
    MicroBatch,
    Plan,
    PlannedSample,
    rank_slots,
)
from tests.data.toy import synthetic_catalogue

SHAPES = [(17, 32, 32), (17, 32, 48), (9, 32, 32), (1, 32, 32)]


def _config(
    buckets: Sequence[BucketConfig],
    slots: int,
    weights: Sequence[float] = (1.0,),
    **options: object,
) -> DataConfig:
    datasets = [DatasetConfig(path="nowhere", weight=weight) for weight in weights]
    config = DataConfig(train=datasets, buckets=list(buckets), micro_batches_per_step=slots)
    return replace(config, **options)  # type: ignore[arg-type]


def _samples(batches: Sequence[MicroBatch]) -> list[PlannedSample]:
    return [sample for batch in batches for sample in batch.samples]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Random catalogues (few or many shards, uneven, several shapes), buckets and slots."""
    slots = draw(st.sampled_from([1, 2, 3, 4, 8]))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=30))
    num_shapes = draw(st.integers(1, 3))
    batch_sizes = draw(st.lists(st.integers(1, 3), min_size=num_shapes, max_size=num_shapes))
    while sum(sizes) < 12 * slots * num_shapes:
        sizes.append(40)
    catalogue = synthetic_catalogue(sizes, SHAPES[:num_shapes], seed=draw(st.integers(0, 9)))
    buckets = [BucketConfig(*s, b) for s, b in zip(SHAPES, batch_sizes, strict=False)]
    window = draw(st.integers(1, 6))
    config = _config(buckets, slots, shuffle_shards=window)
    return Plan.from_catalogues([catalogue], config, draw(st.integers(0, 2**40)))


@settings(max_examples=40, deadline=None)
@given(plans())
def test_a_visit_sees_every_eligible_sample_once(plan: Plan) -> None:
    size = plan.num_samples
    seen: dict[int, list[int]] = defaultdict(list)
    lanes_of: dict[tuple[int, int], set[int]] = defaultdict(set)
    smallest = min(bucket.batch_size or 1 for bucket in plan.config.buckets)
    steps = 3 * size // (plan.num_slots * smallest) + 3 * len(plan.config.buckets)
    for step in range(steps):
        for batch in plan.step(step):
            for sample in batch.samples:
                seen[sample.visit].append(sample.sample_id)
                lanes_of[sample.visit, sample.sample_id].add(batch.slot)
    everyone = set(plan.tables[0].rows["sample_id"].tolist())
    for visit in (0, 1):
        assert Counter(seen[visit]) == Counter(everyone)
    assert all(len(lanes) == 1 for lanes in lanes_of.values()), "a sample on two ranks in a visit"
    assert seen[0] != seen[1], "visits are shuffled anew"


@settings(max_examples=30, deadline=None)
@given(plans(), st.integers(1, 8), st.integers(0, 3))
def test_all_nodes_together_fetch_the_data_once_an_epoch(
    plan: Plan, nodes: int, first_epoch: int
) -> None:
    """Bytes are fetched sample by sample; a node keeps what it has fetched for the epoch."""
    nodes = max(n for n in range(1, nodes + 1) if plan.num_slots % n == 0)
    node_of = {
        slot: node for node in range(nodes) for slot in rank_slots(plan.num_slots, node, nodes)
    }
    rows = plan.tables[0].rows
    whole = int((rows["payload_size"] + rows["meta_size"]).sum())
    fetched: dict[int, set[tuple[int, int]]] = defaultdict(set)
    total: Counter[int] = Counter()
    epochs = range(first_epoch, first_epoch + 2)
    each = max(bucket.batch_size or 1 for bucket in plan.config.buckets) * plan.num_slots
    for step in range((epochs.stop + 1) * plan.num_samples // plan.num_slots + each):
        for batch in plan.step(step):
            for sample in batch.samples:
                taken = (node_of[batch.slot], sample.sample_id)
                if taken not in fetched[sample.visit]:
                    fetched[sample.visit].add(taken)
                    total[sample.visit] += plan.num_bytes(sample)
    for epoch in epochs:
        assert whole <= total[epoch] <= 1.05 * whole


@settings(max_examples=40, deadline=None)
@given(plans(), st.integers(0, 10**12), st.integers(1, 20))
def test_a_step_computed_directly_equals_the_step_reached(plan: Plan, far: int, near: int) -> None:
    fresh = Plan(plan.tables, plan.config, plan.seed)
    walked = [plan.step(k) for k in range(near + 1)]
    assert fresh.step(near) == walked[near]
    assert fresh.micro_batch(near, plan.num_slots - 1) == walked[near][-1]
    direct = fresh.step(far)
    assert plan.step(far) == direct and len(direct) == plan.num_slots
    assert len({(b.cost, len(b.samples), b.samples[0].shape) for b in direct}) == 1
    assert Plan(plan.tables, plan.config, plan.seed + 1).step(near) != walked[near]


@settings(max_examples=30, deadline=None)
@given(plans(), st.integers(0, 50))
def test_ranks_of_any_dividing_world_size_see_the_same_step(plan: Plan, step: int) -> None:
    whole = plan.step(step)
    for world in range(1, plan.num_slots + 1):
        if plan.num_slots % world:
            with pytest.raises(ValueError, match=r"data\.micro_batches_per_step="):
                rank_slots(plan.num_slots, 0, world)
            continue
        blocks = [rank_slots(plan.num_slots, rank, world) for rank in range(world)]
        assert [slot for block in blocks for slot in block] == list(range(plan.num_slots))
        assert [plan.micro_batch(step, slot) for block in blocks for slot in block] == whole


@settings(max_examples=30, deadline=None)
@given(plans(), st.integers(0, 30), st.integers(0, 10**6), st.integers(0, 40))
def test_an_exclusion_changes_one_sample_only(plan: Plan, step: int, pick: int, start: int) -> None:
    samples = _samples(plan.step(step))
    victim = samples[pick % len(samples)].sample_id
    exclusions = [Exclusion(victim, start, "test")]
    for k in range(60):
        before, after = _samples(plan.step(k)), _samples(plan.step(k, exclusions))
        for old, new in zip(before, after, strict=True):
            if old.sample_id == victim and k >= start:
                assert new.sample_id != victim and new.replaces == victim
                assert (new.shape, new.visit, new.segment) == (old.shape, old.visit, old.segment)
            else:
                assert new == old


def test_excluding_more_than_one_chains_to_the_next_candidate() -> None:
    plan = Plan.from_catalogues(
        [synthetic_catalogue([40], SHAPES[:1])], _config([BucketConfig(17, 32, 32, 2)], 2), 1
    )
    exclusions: list[Exclusion] = []
    while len(exclusions) < 38:
        first = plan.micro_batch(0, 0, exclusions).samples[0]
        assert first.sample_id not in {e.sample_id for e in exclusions}
        exclusions.append(Exclusion(first.sample_id, 0, "test"))
    all_of_them = plan.tables[0].rows["sample_id"].tolist()
    with pytest.raises(ValueError, match="no replacement is left"):
        plan.step(0, [Exclusion(i, 0, "test") for i in all_of_them])


def test_a_replacement_does_not_repeat_the_draws_of_its_own_place() -> None:
    plan = Plan.from_catalogues(
        [synthetic_catalogue([40], SHAPES[:1])], _config([BucketConfig(17, 32, 32, 2)], 2), 1
    )
    original = plan.micro_batch(0, 0).samples[0]
    stand_in = plan.micro_batch(0, 0, [Exclusion(original.sample_id, 0, "x")]).samples[0]
    own = [
        s for k in range(10) for s in _samples(plan.step(k)) if s.sample_id == stand_in.sample_id
    ]
    assert own and all(sample.seed != stand_in.seed for sample in own)


def test_mixtures_follow_their_weights_with_own_visits() -> None:
    big = synthetic_catalogue([50] * 8, SHAPES[:1], dataset="big")
    small = synthetic_catalogue([50] * 2, SHAPES[:1], dataset="small")
    config = _config([BucketConfig(17, 32, 32, 2)], 4, weights=(1.0, 2.0))
    plan = Plan.from_catalogues([big, small], config, 3)
    counts, visits = Counter(), defaultdict(Counter)
    for step in range(75):  # 600 samples: one visit of big, two of small
        samples = _samples(plan.step(step))
        assert 1 <= sum(s.dataset == 1 for s in samples) <= 5, "every step holds the mixture"
        counts.update(s.dataset for s in samples)
        for sample in samples:
            visits[sample.dataset][sample.visit] += 1
    assert abs(counts[1] - 200) <= 4
    assert visits[0][0] >= 390 and visits[1][0] >= 95 and visits[1][1] >= 90


def test_buckets_take_steps_in_proportion_and_steps_mix_no_shapes() -> None:
    shapes = [(17, 32, 32), (17, 32, 32), (17, 32, 32), (1, 32, 32)]
    catalogue = synthetic_catalogue([100] * 8, shapes)
    config = _config([BucketConfig(17, 32, 32, 1), BucketConfig(1, 32, 32, 4)], 4)
    plan = Plan.from_catalogues([catalogue], config, 0)
    taken = Counter(_samples(plan.step(k))[0].shape for k in range(400))
    videos, images = (int(n) for n in plan.lanes[0].totals)
    expected = 400 * videos / (videos + images / 4)
    assert abs(taken[17, 32, 32] - expected) <= 1


def test_lanes_never_drift_apart() -> None:
    catalogue = synthetic_catalogue([37, 5, 61, 3, 80, 7, 9, 40], SHAPES[:1])
    plan = Plan.from_catalogues([catalogue], _config([BucketConfig(17, 32, 32, 1)], 8), 0)
    for step in (0, 1000, 10**6, 10**9):
        visits = {batch.samples[0].visit for batch in plan.step(step)}
        assert max(visits) - min(visits) <= 1
        assert abs(max(visits) - step * 8 / plan.num_samples) <= 1


def _row(frames: int, height: int, width: int, fps: float = 8.0) -> Catalogue:
    return synthetic_catalogue([8], [(frames, height, width)], fps=fps)


def test_bucket_choice_is_nearest_aspect_then_longest() -> None:
    buckets = [
        BucketConfig(17, 32, 32, 1, True),
        BucketConfig(33, 32, 32, 1, True),
        BucketConfig(17, 32, 64, 1, True),
        BucketConfig(17, 64, 64, 1, True),
    ]
    config = _config(buckets, 1, window="start")
    for (frames, height, width), expected in {
        (40, 40, 40): 1,
        (20, 40, 40): 0,
        (20, 40, 70): 2,
        (20, 70, 70): 3,
        (40, 70, 70): 1,  # the longest that fits comes before the largest
        (17, 32, 32): 0,
    }.items():
        plan = Plan.from_catalogues([_row(frames, height, width)], config, 0)
        assert set(plan.tables[0].bucket.tolist()) == {expected}, (frames, height, width)


def test_lengths_draw_images_and_short_clips_from_videos() -> None:
    buckets = [
        *(BucketConfig(frames, 32, 32, 1, True) for frames in (1, 5, 17, 33)),
        BucketConfig(5, 32, 64, 1, True),
    ]
    lengths = [LengthShare(1, 0.5), LengthShare(5, 0.25)]
    config = _config(buckets, 1, lengths=lengths)
    shares = {}
    for name, (frames, width) in {"long": (40, 40), "wide": (20, 70), "short": (3, 40)}.items():
        catalogue = synthetic_catalogue([4000], [(frames, 40, width)])
        table = Plan.from_catalogues([catalogue], config, 0).tables[0]
        again = Plan.from_catalogues([catalogue], config, 1).tables[0]
        assert (table.bucket == again.bucket).all()
        shares[name] = np.bincount(table.bucket, minlength=5) / 4000
    assert shares["long"] == pytest.approx([0.5, 0.25, 0, 0.25, 0], abs=0.03)
    # a frame count that is drawn comes before the aspect ratio; what is left goes by that
    assert shares["wide"] == pytest.approx([0.5, 0, 0, 0, 0.5], abs=0.03)
    assert shares["short"] == pytest.approx([1, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("row", "fps", "reason"),
    [
        ((16, 32, 32), None, "clip shorter than every bucket': 8"),
        ((17, 31, 32), None, "frame smaller than every bucket of its length': 8"),
        ((17, 32, 32), 16.0, "frame rate below data.fps=16.0': 8"),
        ((17, 32, 32), 4.0, "clip shorter than every bucket': 8"),
    ],
)
def test_clips_that_fit_no_bucket_are_counted_drops(
    row: tuple[int, int, int], fps: float | None, reason: str
) -> None:
    config = _config([BucketConfig(17, 32, 32, 1)], 2, fps=fps)
    with pytest.raises(ValueError, match="no sample of 8 fits") as caught:
        Plan.from_catalogues([_row(*row)], config, 0)
    assert reason in str(caught.value)


def test_summary_prints_drops_and_shares() -> None:
    catalogue = synthetic_catalogue([60, 60], [(17, 32, 32), (9, 32, 32), (1, 32, 32)])
    config = _config([BucketConfig(17, 32, 32, 2), BucketConfig(1, 32, 32, 4)], 2)
    config.train[0].where = "key < 'k000100'"
    text = Plan.from_catalogues([catalogue], config, 0).summary()
    assert "dropped, where key < 'k000100': 20" in text
    assert "bucket 17x32x32:" in text and "bucket 1x32x32:" in text and "% of steps" in text


def test_missing_caption_kinds_drop_and_shares_are_kept() -> None:
    catalogue = synthetic_catalogue([400], SHAPES[:1])
    config = _config([BucketConfig(17, 32, 32, 4)], 2)
    config.train[0].captions = {"dense": 0.75, "short": 0.25, "zh": 5.0}
    kinds = Counter(
        s.caption_kind
        for k in range(50)
        for s in _samples(Plan.from_catalogues([catalogue], config, 0).step(k))
    )
    assert kinds.keys() == {"dense", "short"}, "zh is not there, the others share its part"
    assert 60 <= kinds["short"] <= 140
    config.train[0].captions = {"zh": 1.0}
    with pytest.raises(ValueError, match="no caption of kind zh': 400"):
        Plan.from_catalogues([catalogue], config, 0)


def test_a_bucket_that_cannot_fill_is_named() -> None:
    catalogue = synthetic_catalogue([20], SHAPES[:1])
    config = _config([BucketConfig(17, 32, 32, 2), BucketConfig(33, 32, 32, 1)], 4)
    with pytest.raises(ValueError, match=r"data\.buckets\[1\] 33x32x32 can never fill: 0 samples"):
        Plan.from_catalogues([catalogue], config, 0)
    with pytest.raises(ValueError, match=r"data\.buckets\[0\] 17x32x32 can never fill: 20 samples"):
        Plan.from_catalogues([catalogue], _config([BucketConfig(17, 32, 32, 6)], 4), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": "middle"}, r"data\.crop='middle' must be one of"),
        ({"window": "end"}, r"data\.window='end'"),
        ({"decoder": "gpu"}, r"data\.decoder='gpu'"),
        ({"fps": 0.0}, r"data\.fps=0\.0 must be positive"),
        ({"fps": float("nan")}, r"data\.fps=nan"),
        ({"micro_batches_per_step": 0}, r"data\.micro_batches_per_step=0"),
        ({"num_workers": -1}, r"data\.num_workers=-1"),
        ({"max_bad_fraction": 2.0}, r"data\.max_bad_fraction=2\.0"),
        ({"buckets": []}, r"data\.buckets=\[\]"),
        ({"train": []}, r"data\.train=\[\] must name at least one"),
        ({"resize": "area"}, r"data\.resize='area'"),
        ({"decode_timeout": 0.0}, r"data\.decode_timeout=0\.0"),
        ({"decode_memory": 1}, r"data\.decode_memory=1 "),
        ({"cache": CacheConfig(max_bytes=1)}, r"data\.cache\.max_bytes=1"),
        ({"buckets": [BucketConfig(0, 32, 32, 1)]}, r"data\.buckets\[0\]\.frames=0"),
        ({"buckets": [BucketConfig(1, 32, 32, 1)] * 2}, "lists 1x32x32 twice"),
        ({"train": [DatasetConfig("x", weight=0)]}, r"data\.train\[0\]\.weight=0"),
        ({"train": [DatasetConfig("x", weight=1e-7)]}, r"weight=1e-07 must be at least 1e-06"),
        ({"train": [DatasetConfig("x", captions={})]}, r"data\.train\[0\]\.captions"),
        ({"train": [DatasetConfig("x", captions={"a": -1.0})]}, "shares must be >= 0"),
    ],
)
def test_config_errors_name_the_key(change: dict[str, object], message: str) -> None:
    config = replace(_config([BucketConfig(17, 32, 32, 1)], 2), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        Plan.from_catalogues([synthetic_catalogue([8], SHAPES[:1])], config, 0)


def test_long_clips_are_cut_and_resampled_inside_their_length() -> None:
    catalogue = synthetic_catalogue([40], [(300, 32, 32)], fps=30.0)
    config = _config([BucketConfig(17, 32, 32, 2)], 2, fps=16.0, crop="random")
    samples = [
        s for k in range(40) for s in _samples(Plan.from_catalogues([catalogue], config, 0).step(k))
    ]
    starts = np.array([s.times[0] for s in samples])
    assert starts.min() >= 0 and max(s.times[-1] for s in samples) <= 299 / 30 + 1e-3
    assert starts.min() < 1 and starts.max() > 7.5
    assert all(np.allclose(np.diff(s.times), 1 / 16) and s.fps == 16 for s in samples)
    crops = np.array([s.crop for s in samples])
    assert crops.min() >= 0 and crops.max() < 1 and crops.std() > 0.2
    again = _config([BucketConfig(17, 32, 32, 2)], 2, window="center")
    times = Plan.from_catalogues([catalogue], again, 0).step(0)[0].samples[0].times
    assert times[0] == 142 / 30 and times[-1] == 142 / 30 + 16 / 30


def test_fingerprint_covers_what_steps_depend_on_and_nothing_else() -> None:
    catalogue = synthetic_catalogue([40], SHAPES[:1])

    def fingerprint(seed: int = 0, **options: object) -> str:
        config = replace(_config([BucketConfig(17, 32, 32, 2)], 2), **options)  # type: ignore
        return Plan.from_catalogues([catalogue], config, seed).fingerprint

    assert fingerprint() == fingerprint(num_workers=3, max_bad_fraction=0.5)
    others = [fingerprint(1), fingerprint(crop="random"), fingerprint(shuffle_shards=3)]
    assert len({fingerprint(), *others}) == 4


def test_two_folders_of_one_name_are_refused() -> None:
    """Their sample ids would be equal."""
    one, two = (
        replace(synthetic_catalogue([40], SHAPES[:1]), root=Path(name) / "train")
        for name in ("wa", "wb")
    )
    config = _config([BucketConfig(17, 32, 32, 2)], 2, weights=(1.0, 1.0))
    with pytest.raises(ValueError, match="longtake index wb/train --dataset") as caught:
        Plan.from_catalogues([one, two], config, 0)
    assert "wa/train and wb/train are both named 'toy'" in str(caught.value)
    assert len(Plan.from_catalogues([one, one], config, 0).step(0)) == 2


def test_every_sample_left_is_found_as_a_replacement() -> None:
    config = _config([BucketConfig(17, 32, 32, 2)], 2)
    plan = Plan.from_catalogues([synthetic_catalogue([3000], SHAPES[:1])], config, 1)
    ids = plan.tables[0].rows["sample_id"].tolist()
    excluded = [Exclusion(number, 0, "test") for number in ids[:-1]]
    assert {s.sample_id for s in _samples(plan.step(0, excluded))} == {ids[-1]}


def test_the_order_of_caption_kinds_changes_nothing() -> None:
    catalogue = synthetic_catalogue([40], SHAPES[:1])
    steps = []
    for captions in ({"dense": 0.5, "short": 0.5}, {"short": 0.5, "dense": 0.5}):
        config = _config([BucketConfig(17, 32, 32, 2)], 2)
        config.train[0].captions = captions
        plan = Plan.from_catalogues([catalogue], config, 0)
        steps.append([plan.step(k) for k in range(5)])
    assert steps[0] == steps[1]
