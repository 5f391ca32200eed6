"""The plan: which samples form step k, as a pure function of catalogue, config, seed and k.

Nothing depends on ranks, workers or what was read before: step k is computed directly, so resume is
exact at any number of ranks. Slot j of a step draws from lane j; a rank takes neighbouring slots.
"""

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cached_property

import numpy as np
import xxhash

from longtake.data.catalogue import Catalogue
from longtake.data.config import (
    BucketConfig,
    DataConfig,
    DatasetConfig,
    check_data_config,
)
from longtake.data.plan.compile import build_tables, open_tables
from longtake.data.plan.costs import (
    num_tokens,
    pack_size,
    resolve_buckets,
    sample_cost,
    samples_a_step,
)
from longtake.data.plan.draws import Draws
from longtake.data.plan.lanes import Lanes, Place, interleave
from longtake.data.plan.planned import Exclusion, MicroBatch, PlannedSample, excluded_at
from longtake.data.plan.tables import SampleTable
from longtake.data.randomness import derive_seed

__all__ = [
    "BucketConfig",
    "DataConfig",
    "DatasetConfig",
    "Exclusion",
    "MicroBatch",
    "Plan",
    "PlannedSample",
    "rank_slots",
]

_CANDIDATES_IN_LANE, _CANDIDATES = 64, 1024
_ONLY_LOADING = (
    *("val", "num_workers", "prefetch_factor", "decoder", "decode_timeout", "decode_memory"),
    *("max_bad_fraction", "cache"),
)


def rank_slots(micro_batches_per_step: int, rank: int, num_ranks: int) -> range:
    """The slots that a data-parallel rank computes: a contiguous block of lanes.

    Raises:
        ValueError: the slots do not divide by the ranks.
    """
    per_rank, rest = divmod(micro_batches_per_step, num_ranks)
    if rest or not per_rank:
        raise ValueError(
            f"data.micro_batches_per_step={micro_batches_per_step} must be a multiple of the "
            f"{num_ranks} data-parallel ranks; set it to {num_ranks * max(1, per_rank)}"
        )
    return range(rank * per_rank, (rank + 1) * per_rank)


class Plan:
    """The training plan over `config.train`, whose tables come in the same order."""

    def __init__(self, tables: Sequence[SampleTable], config: DataConfig, seed: int) -> None:
        """`config` is resolved, and the tables were compiled with it.

        Raises:
            ValueError: a bucket that cannot fill.
        """
        self.tables, self.config, self.seed = list(tables), config, seed
        self.num_slots = config.micro_batches_per_step
        self._draws = Draws(self.tables, config.train, config)
        self.lanes = [
            Lanes(
                *(table.bounds, table.counts, table.bucket_parts),
                num_lanes=self.num_slots,
                window=config.shuffle_shards,
                seed=derive_seed(seed, "plan", table.info.dataset, index),
            )
            for index, table in enumerate(self.tables)
        ]
        self._check_buckets_fill()
        if config.flip and any(table.info.holds_latents for table in self.tables):
            raise ValueError("data.flip=true: cached latents cannot be mirrored; set it to false")
        self._mixture = self._dataset_shares()
        self._schedule = self._bucket_shares()
        self._pack_size = (
            pack_size(config.buckets, self._schedule, config.cost) if config.pack else 0
        )

    @classmethod
    def from_config(cls, config: DataConfig, seed: int) -> "Plan":
        """The plan of a config, its tables compiled or taken from the cache."""
        check_data_config(config, "train")
        config = resolve_buckets(config)
        return cls(open_tables(config.train, config, must_fill=True), config, seed)

    @classmethod
    def from_catalogues(
        cls, catalogues: Sequence[Catalogue], config: DataConfig, seed: int
    ) -> "Plan":
        """The plan over catalogues in memory, in the order of `config.train`."""
        check_data_config(config, "train")
        config = resolve_buckets(config)
        return cls(build_tables(catalogues, config.train, config, must_fill=True), config, seed)

    @property
    def num_samples(self) -> int:
        """Eligible samples over all datasets."""
        return sum(table.num_samples for table in self.tables)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that steps depend on; options that only concern loading stay out."""
        config = dataclasses.asdict(self.config)
        kept = {key: value for key, value in config.items() if key not in _ONLY_LOADING}
        for dataset in kept["train"]:
            dataset.pop("path"), dataset.pop("catalogue")
        state = [kept, [table.info.fingerprint for table in self.tables], self.seed]
        return xxhash.xxh3_128_hexdigest(json.dumps(state, sort_keys=True).encode())

    def micro_batch(self, step: int, slot: int, exclusions: Iterable[Exclusion] = ()) -> MicroBatch:
        """The samples of one slot of a step; excluded ones are replaced in place.

        Raises:
            ValueError: so much is excluded that a sample has no replacement.
        """
        if step < 0 or not 0 <= slot < self.num_slots:
            raise ValueError(f"step={step} must be >= 0 and slot={slot} within {self.num_slots}")
        excluded = excluded_at(exclusions, step)
        samples = []
        for bucket, position in self._positions(step):
            sample = self._planned(slot, bucket, position)
            if sample.sample_id in excluded:
                sample = self.replacement(sample, excluded)
            samples.append(sample)
        cost = sum(sample_cost(self.config.buckets[s.bucket], self.config.cost) for s in samples)
        return MicroBatch(step, slot, samples, cost)

    def step(self, step: int, exclusions: Iterable[Exclusion] = ()) -> list[MicroBatch]:
        """All micro-batches of a step, slot by slot."""
        exclusions = tuple(exclusions)
        return [self.micro_batch(step, slot, exclusions) for slot in range(self.num_slots)]

    def num_bytes(self, sample: PlannedSample) -> int:
        """Bytes that reading a sample fetches: payload and captions."""
        table = self.tables[sample.dataset]
        record = table.record(sample.row)
        texts = sum(text["size"] for text in table.texts(record))
        return record.payload_size + record.meta_size + texts

    def replacement(self, sample: PlannedSample, excluded: Collection[int]) -> PlannedSample:
        """The sample that stands in for `sample`: the first candidate of a hash of (seed,
        sample_id, visit, i) in the same bucket and lane (then the same bucket) not excluded.

        Raises:
            ValueError: no candidate is left.
        """
        original = sample.sample_id if sample.replaces is None else sample.replaces
        lanes = self.lanes[sample.dataset]
        for position in self._candidates(sample, original):
            row = lanes.row_at(sample.bucket, sample.visit, position)
            sample_id = self.tables[sample.dataset].record(row).sample_id
            if sample_id in excluded or sample_id == original:
                continue
            place = Place(row, sample.visit, sample.segment)
            found = self._train_sample(sample.dataset, place, sample.bucket, original)
            return dataclasses.replace(found, replaces=original)
        raise ValueError(
            f"no replacement is left for sample {sample.key!r} in bucket "
            f"{self.config.buckets[sample.bucket].name}: {len(excluded)} samples are excluded"
        )

    def _candidates(self, sample: PlannedSample, original: int) -> Iterator[int]:
        """Positions in a visit's order of a bucket: drawn in the lane, then anywhere, then all."""
        total = int(self.lanes[sample.dataset].totals[sample.bucket])
        for number in range(_CANDIDATES):
            start, stop = sample.segment if number < _CANDIDATES_IN_LANE else (0, total)
            draw = derive_seed(self.seed, "replacement", original, sample.visit, number)
            yield start + draw % (stop - start)
        yield from range(total)

    @property
    def closed(self) -> list[int]:
        """Optional buckets that cannot fill a step and take nothing."""
        totals = np.sum([lanes.totals for lanes in self.lanes], axis=0)
        return np.flatnonzero(totals == 0).tolist()

    def summary(self) -> str:
        """Samples, drops and buckets, for the start of a run."""
        lines = self._drops()
        total = sum(self._schedule)
        for index, bucket in enumerate(self.config.buckets):
            samples = sum(int(lanes.totals[index]) for lanes in self.lanes)
            if not samples:
                continue  # an optional bucket whose samples went to the next best ones
            share = f"{self._schedule[index] / total:.1%}"
            each = sample_cost(bucket, self.config.cost)
            tokens = num_tokens(bucket, self.config.cost)
            lines.append(
                f"bucket {bucket.name}: {samples} samples, "
                + (
                    f"{share} of each pack of {self._pack_size}, cost {each:.3g} a sample"
                    if self.config.pack
                    else f"{share} of steps, {self.num_slots} x {bucket.batch_size} a step, "
                    f"{bucket.batch_size * tokens} tokens and cost "
                    f"{bucket.batch_size * each:.3g} a slot"
                )
            )
        return "\n".join(lines)

    def _positions(self, step: int) -> list[tuple[int, int]]:
        """(bucket, position in its streams) of a micro-batch: alike in all slots of a step, which
        therefore cost the same."""
        if self.config.pack:
            first = step * self._pack_size
            return [
                interleave(position, self._schedule, (1, 2))
                for position in range(first, first + self._pack_size)
            ]
        bucket, turn = interleave(step, self._schedule, (1, 2))
        size = self.config.buckets[bucket].batch_size
        return [(bucket, position) for position in range(turn * size, (turn + 1) * size)]

    def _planned(self, slot: int, bucket: int, position: int) -> PlannedSample:
        # Each lane starts the mixture elsewhere, so that every step holds the whole mixture.
        phase = (2 * slot + 1, 2 * self.num_slots)
        dataset, index = interleave(position, self._mixture[bucket], phase)
        return self._train_sample(dataset, self.lanes[dataset].locate(bucket, slot, index), bucket)

    def _train_sample(
        self, dataset: int, place: Place, bucket: int, replaces: int | None = None
    ) -> PlannedSample:
        record = self.tables[dataset].record(place.row)
        parts = (self.seed, record.sample_id, place.visit)
        seed = derive_seed(*parts) if replaces is None else derive_seed(*parts, replaces)
        return self._draws.sample(dataset, place, record, bucket, seed, augment=True)

    def _drops(self) -> list[str]:
        return [line for table in self.tables for line in table.drops()]

    def _check_buckets_fill(self) -> None:
        for index, bucket in enumerate(self.config.buckets):
            found = sum(int(lanes.totals[index]) for lanes in self.lanes)
            needed = samples_a_step(bucket, self.config)
            if found < needed and not (bucket.optional and not found):
                latents = any(table.info.holds_latents for table in self.tables)
                remedy = "encode it with `longtake encode`, " if latents else ""
                raise ValueError(
                    f"data.buckets[{index}] {bucket.name} can never fill: {found} samples fit it, "
                    f"one step needs {self.num_slots} micro-batches of {needed // self.num_slots}; "
                    f"{remedy}remove the bucket, or lower its batch_size or "
                    f"data.micro_batches_per_step\n" + "\n".join(self._drops())
                )

    def _dataset_shares(self) -> list[list[int]]:
        """Integer shares of the datasets within each bucket."""
        weights = [Fraction(d.weight).limit_denominator(10**6) for d in self.config.train]
        unit = math.lcm(*(weight.denominator for weight in weights))
        return [
            [
                int(weight * unit) * int(lanes.totals[index])
                for weight, lanes in zip(weights, self.lanes, strict=True)
            ]
            for index in range(len(self.config.buckets))
        ]

    def _bucket_shares(self) -> list[int]:
        """Integer shares of the buckets: among the steps, or in packs among the samples."""
        sizes = [1 if self.config.pack else b.batch_size for b in self.config.buckets]
        common = math.lcm(*sizes)
        return [sum(m) * (common // s) for m, s in zip(self._mixture, sizes, strict=True)]
