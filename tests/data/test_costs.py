"""Batch sizes, grids and packs follow from what samples cost."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.data.config import (
    BucketConfig,
    CostConfig,
    DataConfig,
    DatasetConfig,
    GridConfig,
    LengthShare,
    check_data_config,
)
from longtake.data.plan import Plan
from longtake.data.plan.costs import num_tokens, pack_size, resolve_buckets, sample_cost
from longtake.data.plan.lanes import interleave
from tests.data.toy import synthetic_catalogue

COST = CostConfig(hidden_size=64, token=[4, 16, 16], max_tokens=256)


def test_tokens_and_cost_follow_the_formula() -> None:
    assert num_tokens(BucketConfig(1, 32, 32), COST) == 4
    assert num_tokens(BucketConfig(17, 32, 48), COST) == 5 * 2 * 3
    assert num_tokens(BucketConfig(18, 33, 48), COST) == 6 * 3 * 3
    n, d = 30, 64
    assert sample_cost(BucketConfig(17, 32, 48), COST) == n * (84 * d**2 + 12 * n * d)
    measured = replace(COST, seconds={"17x32x48": 0.25})
    assert sample_cost(BucketConfig(17, 32, 48), measured) == 0.25


def test_batch_sizes_fill_the_cap_at_equal_cost() -> None:
    buckets = [BucketConfig(17, 32, 32), BucketConfig(1, 32, 32), BucketConfig(17, 64, 64, 2)]
    config = resolve_buckets(DataConfig(buckets=buckets, cost=COST))
    sizes = [bucket.batch_size for bucket in config.buckets]
    assert sizes == [12, 64, 2], "a size that is given stays"
    assert resolve_buckets(config) == config
    measured = replace(COST, seconds={"17x32x32": 0.1, "1x32x32": 0.05, "17x64x64": 0.4})
    again = resolve_buckets(
        DataConfig(buckets=buckets[:2] + [BucketConfig(17, 64, 64)], cost=measured)
    )
    costs = [
        bucket.batch_size * measured.seconds[bucket.name]  # type: ignore[operator]
        for bucket in again.buckets
    ]
    assert max(costs) / min(costs) < 3.3 and sizes != [b.batch_size for b in again.buckets]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(buckets=[BucketConfig(1, 32, 32)]), "1x32x32 has no batch_size"),
        (
            DataConfig(buckets=[BucketConfig(17, 256, 256)], cost=COST),
            r"data\.buckets\[0\] 17x256x256: 1 samples of 1280 tokens are over .*max_tokens=256",
        ),
        (
            DataConfig(buckets=[BucketConfig(1, 32, 32)], cost=CostConfig(seconds={"9x9x9": 1.0})),
            "without seconds .*1x32x32.*no buckets .*9x9x9",
        ),
        (DataConfig(buckets=[BucketConfig(1, 8, 8, 1)], pack=True), "data.pack=true needs"),
        (DataConfig(grid=GridConfig([], [64])), r"data\.grid\.frames=\[\]"),
        (DataConfig(grid=GridConfig([1], [64], 16)), r"data\.grid\.multiple=16"),
        (DataConfig(grid=GridConfig([1], [64], 4, 0.5)), r"data\.grid\.max_aspect=0\.5"),
        (DataConfig(grid=GridConfig([1], [64], 4, batch_size=0)), r"data\.grid\.batch_size=0"),
        (
            DataConfig(buckets=[BucketConfig(1, 8, 8, 1)], lengths=[LengthShare(5, 0.1)]),
            r"data\.lengths names \[5\] frames: .* there are buckets of 1$",
        ),
        (
            DataConfig(buckets=[BucketConfig(1, 8, 8, 1)], lengths=[LengthShare(1, 1.5)]),
            r"data\.lengths: shares sum to 1\.5",
        ),
        (
            DataConfig(buckets=[BucketConfig(1, 8, 8, 1)], lengths=[LengthShare(1, 0)]),
            r"data\.lengths\[0\]\.share=0",
        ),
        (
            DataConfig(buckets=[BucketConfig(1, 8, 8, 1)], cost=CostConfig(token=[1, 2])),
            r"data\.cost\.token=\[1, 2\]",
        ),
    ],
)
def test_errors_name_the_key(config: DataConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_data_config(config)
        resolve_buckets(config)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(16, 512), min_size=1, max_size=3, unique=True),
    st.sampled_from([1, 4, 16]),
    st.floats(1, 4),
)
def test_a_grid_keeps_its_bounds(sides: list[int], multiple: int, max_aspect: float) -> None:
    areas = [side**2 for side in sides]
    grid = GridConfig([1, 17], areas, multiple, max_aspect, batch_size=1)
    config = resolve_buckets(DataConfig(grid=grid, buckets=[BucketConfig(1, 16, 16, 3)]))
    shapes = [(b.frames, b.height, b.width) for b in config.buckets]
    assert len(set(shapes)) == len(shapes) and config.grid is None
    for bucket in config.buckets[1:]:
        assert bucket.optional and bucket.height * bucket.width <= max(areas)
        assert bucket.height % multiple == bucket.width % multiple == 0
    heights = {(h, w) for _, h, w in shapes[1:]}
    assert {(h, w) for h, w in heights if h == w}, "the square is always there"


def test_optional_buckets_that_cannot_fill_leave_their_samples_to_others() -> None:
    """Aspect ratios that a set has are kept; the few of another one are cropped, not lost."""
    shapes = [(17, 72, 128)] * 9 + [(17, 128, 72)] * 9 + [(17, 100, 100)]
    catalogue = synthetic_catalogue([100, 100], shapes)
    grid = GridConfig([17], [64 * 64], 16, 2.0, batch_size=2)
    config = DataConfig(train=[DatasetConfig("x")], grid=grid, micro_batches_per_step=8)
    plan = Plan.from_catalogues([catalogue], config, 0)
    assert plan.num_samples == 200
    seen: Counter[tuple[int, int, int]] = Counter()
    for step in range(40):
        for batch in plan.step(step):
            seen.update(sample.shape for sample in batch.samples)
    assert all(w > h or h > w for _, h, w in seen), seen
    assert len(plan.summary().splitlines()) == 1 + len(seen)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=8).filter(any),
    st.lists(st.integers(1, 12), min_size=8, max_size=8),
    st.integers(0, 10**9),
    st.integers(50, 400),
)
def test_no_pack_is_over_the_cap(
    weights: list[int], sides: list[int], start: int, cap: int
) -> None:
    cost = CostConfig(64, [1, 1, 1], cap)
    buckets = [BucketConfig(1, side, side, optional=True) for side in sides[: len(weights)]]
    try:
        size = pack_size(buckets, weights, cost)
    except ValueError:
        assert cap < sum(num_tokens(b, cost) for b in buckets) + max(
            num_tokens(b, cost) for b in buckets
        )
        return
    for pack in range(start, start + 40):
        picks = [interleave(i, weights, (1, 2))[0] for i in range(pack * size, (pack + 1) * size)]
        assert sum(num_tokens(buckets[bucket], cost) for bucket in picks) <= cap


def test_packs_hold_all_buckets_and_slots_cost_the_same() -> None:
    shapes = [(17, 32, 32), (17, 32, 48), (9, 32, 32), (1, 32, 32)]
    catalogue = synthetic_catalogue([60] * 10, shapes)
    config = DataConfig(
        train=[DatasetConfig("x")],
        buckets=[BucketConfig(*shape) for shape in shapes],
        cost=COST,
        pack=True,
        micro_batches_per_step=4,
    )
    plan = Plan.from_catalogues([catalogue], config, 3)
    seen: Counter[int] = Counter()
    for step in range(60):
        batches = plan.step(step)
        assert len({batch.cost for batch in batches}) == 1
        for batch in batches:
            tokens = sum(num_tokens(plan.config.buckets[s.bucket], COST) for s in batch.samples)
            assert 0.6 * 256 <= tokens <= 256 and len({s.shape for s in batch.samples}) > 1
            seen.update(s.sample_id for s in batch.samples if s.visit == 0)
    assert set(seen.values()) == {1} and len(seen) == plan.num_samples
    assert "of each pack of" in plan.summary()


def test_packs_close_no_bucket_that_fills_them() -> None:
    catalogue = synthetic_catalogue([100], [(9, 32, 32)])
    grid = GridConfig([9], [32 * 32], 16, 1.0, batch_size=64)
    cost = CostConfig(hidden_size=64, token=[4, 16, 16], max_tokens=2048)
    config = DataConfig(train=[DatasetConfig("x")], grid=grid, cost=cost, micro_batches_per_step=4)
    with pytest.raises(ValueError, match="fits only buckets that cannot fill a step': 100"):
        Plan.from_catalogues([catalogue], config, 0)
    assert Plan.from_catalogues([catalogue], replace(config, pack=True), 0).num_samples == 100
