"""The order inside a lane: even mixtures, shuffled windows."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.data.plan.lanes import Lanes, count_pieces, cut_pieces, interleave


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any),
    st.integers(0, 7),
)
def test_interleave_is_even_and_counts_each_item(weights: list[int], shift: int) -> None:
    seen = Counter()
    for position in range(3 * sum(weights)):
        item, index = interleave(position, weights, (2 * shift + 1, 16))
        assert index == seen[item]
        seen[item] += 1
    assert [seen[i] for i in range(len(weights))] == [3 * weight for weight in weights]
    far = 10**15
    item, index = interleave(far, weights, (2 * shift + 1, 16))
    assert abs(index - far * weights[item] / sum(weights)) <= len(weights) + 1


def test_the_next_sample_rarely_comes_from_the_same_shard() -> None:
    """A buffer of 100 draws the same shard 27 % of the time; the ideal for 16 shards is 1/16."""
    shards = np.repeat(np.arange(512), 100)
    bucket, bounds = np.zeros(len(shards), np.int16), cut_pieces(np.full(512, 100), 8)
    counts = count_pieces(bounds, bucket, 1)
    lanes = Lanes(bounds, counts, bucket, num_lanes=8, window=16, seed=5)
    drawn = np.array([shards[lanes.locate(0, 3, i).row] for i in range(6400)])
    same = float((np.diff(drawn) == 0).mean())
    assert same <= 1.1 / 16
    assert len(set(drawn.tolist())) <= 66, "a lane touches only its share of the shards"
