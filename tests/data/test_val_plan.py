from dataclasses import replace

import numpy as np
import pytest

from longtake.data.config import BucketConfig, CostConfig, DatasetConfig
from longtake.data.plan.val_plan import ValPlan
from tests.data.test_plan import _config, _samples
from tests.data.toy import synthetic_catalogue


def test_validation_is_a_fixed_pass_divided_over_ranks() -> None:
    catalogue = synthetic_catalogue([50, 50], [(17, 32, 32), (1, 32, 32)])
    config = replace(
        _config([BucketConfig(17, 32, 32, 4), BucketConfig(1, 32, 32, 8)], 2),
        val=[DatasetConfig("nowhere")],
    )
    plan = ValPlan.from_catalogues([catalogue], config, 0, 60)
    whole = plan.micro_batches(0, 1)
    assert sorted(s.row for s in _samples(whole)) == sorted(
        row for bucket in (0, 1) for row in np.flatnonzero(plan.tables[0].bucket == bucket)[:30]
    )
    for world in (2, 3, 5):
        ranks = [plan.micro_batches(rank, world) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1, "ranks must stay in step"
        counted = [b for batches in ranks for b in batches if b.counted]
        key = {s.sample_id: s for s in _samples(counted)}
        assert len(key) == len(_samples(counted)) == 60
        assert key == {s.sample_id: s for s in _samples(whole)}
        for round_of in zip(*ranks, strict=True):
            assert len({b.samples[0].shape for b in round_of}) == 1
    with pytest.raises(ValueError, match="at least one dataset"):
        ValPlan.from_catalogues([], _config([BucketConfig(17, 32, 32, 4)], 2), 0, 8)


def test_validation_sees_every_dataset_and_bucket() -> None:
    small, large = (
        synthetic_catalogue([40], [shape], dataset=name)
        for name, shape in (("small", (1, 32, 32)), ("large", (17, 32, 32)))
    )
    config = replace(
        _config([BucketConfig(17, 32, 32, 4), BucketConfig(1, 32, 32, 8)], 2),
        val=[DatasetConfig("nowhere")] * 2,
    )
    seen = _samples(ValPlan.from_catalogues([small, large], config, 0, 9).micro_batches(0, 1))
    assert sorted((s.dataset, s.row) for s in seen) == [
        *((0, row) for row in range(5)),
        *((1, row) for row in range(4)),
    ]
    everything = ValPlan.from_catalogues(
        [small], replace(config, val=config.val[:1]), 0, 40
    ).micro_batches(0, 1)
    assert [s.row for s in _samples(everything)] == list(range(40))


def test_a_pack_of_validation_is_within_the_cap_whatever_its_batch_size() -> None:
    catalogue = synthetic_catalogue([20, 20], [(5, 16, 16), (1, 16, 16)])
    config = replace(
        _config([BucketConfig(5, 16, 16, 16), BucketConfig(1, 16, 16)], 2),
        cost=CostConfig(token=[1, 4, 4], max_tokens=300),
        pack=True,
        val=[DatasetConfig("nowhere")],
    )
    batches = ValPlan.from_catalogues([catalogue], config, 0, 40).micro_batches(0, 1)
    most: dict[tuple[int, int, int], int] = {}
    for batch in batches:
        (shape,) = {sample.shape for sample in batch.samples}
        most[shape] = max(most.get(shape, 0), len(batch.samples))
    assert most == {(5, 16, 16): 3, (1, 16, 16): 18}  # of 80 and 16 tokens
