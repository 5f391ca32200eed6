"""Exact, random-access order of one dataset's samples over lanes, visits and buckets.

In each visit the shards come in a new random order. For each bucket the samples in that order are
cut into one contiguous segment for each lane, equal within one sample over any number of visits,
so lanes neither drift apart nor share a sample, and a lane touches about 1/lanes of the shards.
Inside a segment the samples of a window of shards are shuffled together. A lane's segments of
successive visits form one endless stream: tails are carried on, nothing is dropped.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longtake.data.plan.tables import FileArray
from longtake.data.randomness import derive_seed, hash_order

_WINDOWS_KEPT = 256  # 16 shards of 500 samples make 64 kB


def interleave(position: int, weights: Sequence[int], phase: tuple[int, int]) -> tuple[int, int]:
    """Which of the weighted items comes at `position` of an endless even mixture, and its rank.

    Item i appears within one of position * weights[i] / sum(weights) times among any first
    positions of its level (an error-diffusion rule applied to one item against the rest). `phase`,
    a fraction in [0, 1), shifts the pattern. O(items), exact at any position.
    """
    numerator, denominator = phase
    total = sum(weights)
    for item, weight in enumerate(weights[:-1]):
        shift = total * numerator // denominator
        before = (position * weight + shift) // total
        if ((position + 1) * weight + shift) // total > before:
            return item, before
        position -= before
        total -= weight
    return len(weights) - 1, position


@dataclass(frozen=True)
class Place:
    """A sample's place: its row in the catalogue, the visit, and the segment it belongs to."""

    row: int
    visit: int
    segment: tuple[int, int]


class Lanes:
    """Streams of one dataset: `locate(bucket, lane, i)` is the i-th sample of (lane, bucket)."""

    def __init__(
        self,
        bounds: np.ndarray,
        counts: np.ndarray,
        bucket: np.ndarray | FileArray,
        *,
        num_lanes: int,
        window: int,
        seed: int,
    ) -> None:
        """`bounds` (P + 1,) and `counts` (P, buckets) of `cut_pieces` and `count_pieces`; `bucket`
        (N,) of each row."""
        self.num_lanes, self.window, self.seed = num_lanes, window, seed
        self.bounds, self.counts, self.bucket = bounds, counts, bucket
        self.totals = counts.sum(axis=0)
        self._orders: OrderedDict[Hashable, Any] = OrderedDict()
        self._segments: OrderedDict[Hashable, Any] = OrderedDict()
        self._windows: OrderedDict[Hashable, Any] = OrderedDict()

    def locate(self, bucket: int, lane: int, index: int) -> Place:
        """The index-th sample of a stream; O(1) but for orders and windows, which are kept."""
        total = int(self.totals[bucket])
        visit = (self.num_lanes * index + lane) // total
        edges = _remember(
            self._segments,
            (bucket, visit, lane),
            lambda: self._window_edges(bucket, visit, lane),
            _WINDOWS_KEPT,
        )
        position = edges[0] + index - self._lane_length(total, visit, lane)
        number = bisect_right(edges, position) - 1
        rows = _remember(
            self._windows,
            (bucket, visit, lane, number),
            lambda: self._shuffled(bucket, visit, lane, number, edges[number], edges[number + 1]),
            _WINDOWS_KEPT,
        )
        return Place(int(rows[position - edges[number]]), visit, (edges[0], edges[-1]))

    def row_at(self, bucket: int, visit: int, position: int) -> int:
        """The row at an unshuffled position of a visit's order of a bucket."""
        return int(self._rows(bucket, visit, position, position + 1)[0])

    def _lane_length(self, total: int, visits: int, lane: int) -> int:
        """Samples that a lane's stream holds in its first `visits` visits: an even deal."""
        return (visits * total + self.num_lanes - 1 - lane) // self.num_lanes

    def _window_edges(self, bucket: int, visit: int, lane: int) -> list[int]:
        """Positions where a segment's windows begin, and its end: the segment's pieces in groups
        of about `window`, all of nearly equal number."""
        total = int(self.totals[bucket])
        length = self._lane_length
        lengths = [length(total, visit + 1, i) - length(total, visit, i) for i in range(lane + 1)]
        stop = sum(lengths)
        start = stop - lengths[-1]
        _, ends = self._order(bucket, visit)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right").tolist()
        num_pieces = last + 1 - first
        num_windows = -(-num_pieces // self.window)
        inner = [first + num_pieces * i // num_windows for i in range(1, num_windows)]
        return [start, *(int(ends[piece - 1]) for piece in inner), stop]

    def _order(self, bucket: int, visit: int) -> tuple[np.ndarray, np.ndarray]:
        """Pieces that hold samples of the bucket, in the visit's order, and their running sums."""

        def build() -> tuple[np.ndarray, np.ndarray]:
            order = hash_order(len(self.counts), derive_seed(self.seed, "shards", visit))
            counts = self.counts[order, bucket]
            return order[counts > 0].astype(np.int32), np.cumsum(counts[counts > 0])

        return _remember(self._orders, (bucket, visit), build, 2 * self.counts.shape[1] + 2)

    def _rows(self, bucket: int, visit: int, start: int, stop: int) -> np.ndarray:
        """Rows at the unshuffled positions start..stop of a visit's order of a bucket."""
        pieces, ends = self._order(bucket, visit)
        low, high = np.searchsorted(ends, [start, stop - 1], side="right")
        offset = int(ends[low - 1]) if low else 0
        found = []
        for piece in pieces[low : high + 1]:
            begin, end = self.bounds[piece], self.bounds[piece + 1]
            found.append(begin + np.flatnonzero(self.bucket[begin:end] == bucket))
        return np.concatenate(found)[start - offset : stop - offset]

    def _shuffled(
        self, bucket: int, visit: int, lane: int, number: int, start: int, stop: int
    ) -> np.ndarray:
        rows = self._rows(bucket, visit, start, stop)
        seed = derive_seed(self.seed, "samples", bucket, visit, lane, number)
        return rows[hash_order(len(rows), seed)]

    def __getstate__(self) -> dict[str, Any]:
        caches = ("_orders", "_segments", "_windows")
        return {**self.__dict__, **{name: OrderedDict() for name in caches}}


def cut_pieces(shard_sizes: np.ndarray, num_lanes: int) -> np.ndarray:
    """Row bounds (P + 1,) of what is dealt as a whole: shards, or ranges of them where few.

    `shard_sizes` (S,) are rows of each shard, in order. Under two shards for each lane would always
    bring the same rows together in a lane.
    """
    sizes = shard_sizes[shard_sizes > 0]
    edges = np.concatenate([[0], np.cumsum(sizes)])
    if not len(sizes) or len(sizes) >= 2 * num_lanes:
        return edges
    ranges = -(-4 * num_lanes // len(sizes))
    parts = np.arange(ranges) / ranges
    inner = edges[:-1, None] + (sizes[:, None] * parts[None]).astype(np.int64)
    return np.unique(np.concatenate([inner.ravel(), edges[-1:]]))


def count_pieces(bounds: np.ndarray, bucket: np.ndarray, num_buckets: int) -> np.ndarray:
    """(P, num_buckets) int64: rows of each bucket in each piece; those of -1 have none."""
    pieces = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    kept = bucket >= 0
    flat = np.bincount(
        pieces[kept] * num_buckets + bucket[kept], minlength=(len(bounds) - 1) * num_buckets
    )
    return flat.reshape(-1, num_buckets)


def _remember(
    cache: OrderedDict[Hashable, Any], key: Hashable, build: Callable[[], Any], limit: int
) -> Any:
    """Least-recently-used cache: a worker walks its lanes in order, so few entries are live."""
    if key in cache:
        cache.move_to_end(key)
        return cache[key]
    value = cache[key] = build()
    if len(cache) > limit:
        cache.popitem(last=False)
    return value
