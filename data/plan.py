"""The plan: which samples form step k, as a pure function of catalogue, config, seed and k.

Nothing depends on ranks, workers or what was read before: step k is computed directly, so resume
exact at any number of ranks. Slot j of a step draws from lane j; a rank takes neighbouring slots.
"""

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from longtake.data.buckets import Eligible, assign_buckets
from longtake.data.catalogue import Catalogue, column, load_catalogue, refuse_equal_names
from longtake.data.lanes import Lanes, Place, interleave
from longtake.data.plan_config import (
    BucketConfig,
    DataConfig,
    DatasetConfig,
    check_data_config,
)
from longtake.data.planned import Exclusion, MicroBatch, PlannedSample, excluded_at
from longtake.data.randomness import derive_seed, uniform

__all__ = [
    "BucketConfig",
    "DataConfig",
    "DatasetConfig",
    "Exclusion",
    "MicroBatch",
    "Plan",
    "PlannedSample",
    "ValPlan",
    "open_catalogues",
    "rank_slots",
]

_CANDIDATES_IN_LANE, _CANDIDATES = 64, 1024


def open_catalogues(datasets: Sequence[DatasetConfig]) -> list[Catalogue]:
    """The catalogue of each dataset, in order; errors as of `load_catalogue`."""
    return [load_catalogue(dataset.path, dataset.catalogue) for dataset in datasets]


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


class _Samples:
    """What the training and the validation plan share: datasets cut into buckets."""

    def __init__(
        self,
        catalogues: Sequence[Catalogue],
        datasets: Sequence[DatasetConfig],
        config: DataConfig,
        seed: int,
    ) -> None:
        check_data_config(config)
        if not datasets:
            raise ValueError("data.train and data.val must each name at least one dataset")
        refuse_equal_names(catalogues)
        self.config, self.seed = config, seed
        self.eligible = [
            assign_buckets(catalogue, dataset, config)
            for catalogue, dataset in zip(catalogues, datasets, strict=True)
        ]
        self.catalogues = [eligible.catalogue for eligible in self.eligible]
        self._columns = [
            {name: column(c.table, name) for name in ("sample_id", "frames", "fps", "duration")}
            for c in self.catalogues
        ]

    def _sample(
        self, dataset: int, place: Place, bucket: int, seed: int, *, crop: str, window: str
    ) -> PlannedSample:
        """Fill in everything about a sample that is drawn from its seed."""
        shape = self.config.buckets[bucket]
        columns, row = self._columns[dataset], place.row
        rate, times = clip_times(
            frames=int(columns["frames"][row]),
            fps=float(columns["fps"][row]),
            duration=float(columns["duration"][row]),
            length=shape.frames,
            target_fps=self.config.fps,
            part=uniform(seed, "times") if window == "random" else float(window == "center") / 2,
        )
        at = (uniform(seed, "crop.y"), uniform(seed, "crop.x")) if crop == "random" else (0.5, 0.5)
        return PlannedSample(
            dataset=dataset,
            row=row,
            sample_id=int(columns["sample_id"][row]),
            key=self.catalogues[dataset].table.column("key")[row].as_py(),
            visit=place.visit,
            shape=(shape.frames, shape.height, shape.width),
            times=times,
            fps=rate,
            crop=at,
            caption_kind=self._caption_kind(dataset, row, seed),
            seed=seed,
            bucket=bucket,
            segment=place.segment,
        )

    def _caption_kind(self, dataset: int, row: int, seed: int) -> str:
        eligible = self.eligible[dataset]
        shares = [
            (kind, share)
            for bit, (kind, share) in enumerate(eligible.config.captions.items())
            if share > 0 and int(eligible.kinds[row]) >> bit & 1
        ]
        left = uniform(seed, "caption") * sum(share for _, share in shares)
        for kind, share in shares:
            left -= share
            if left < 0:
                return kind
        return shares[-1][0]

    def _cost(self, bucket: int, batch_size: int) -> float:
        shape = self.config.buckets[bucket]
        return float(batch_size * shape.frames * shape.height * shape.width)

    def _drops(self) -> list[str]:
        lines = []
        for eligible in self.eligible:
            catalogue = eligible.catalogue
            lines.append(f"{catalogue.dataset}: {eligible.num_samples} samples")
            if catalogue.rejected:
                lines.append(f"  rejected when indexing: {len(catalogue.rejected)}")
            lines += [f"  dropped, {why}: {n}" for why, n in eligible.dropped.items() if n]
        return lines


class Plan(_Samples):
    """The training plan over `config.train`, whose catalogues come in the same order."""

    def __init__(self, catalogues: Sequence[Catalogue], config: DataConfig, seed: int) -> None:
        """Raises:
        ValueError: a config error, a filter that leaves nothing, a bucket that cannot fill.
        """
        super().__init__(catalogues, config.train, config, seed)
        self.num_slots = config.micro_batches_per_step
        self.lanes = [
            Lanes(
                _shard_numbers(eligible),
                eligible.bucket,
                num_buckets=len(config.buckets),
                num_lanes=self.num_slots,
                window=config.shuffle_shards,
                seed=derive_seed(seed, "plan", eligible.catalogue.dataset, index),
            )
            for index, eligible in enumerate(self.eligible)
        ]
        self._check_buckets_fill()
        self._mixture, self._schedule = self._shares()

    @classmethod
    def from_config(cls, config: DataConfig, seed: int) -> "Plan":
        """The plan of a config, its catalogues loaded."""
        check_data_config(config)
        return cls(open_catalogues(config.train), config, seed)

    @property
    def num_samples(self) -> int:
        """Eligible samples over all datasets."""
        return sum(eligible.num_samples for eligible in self.eligible)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that steps depend on; options that only concern loading stay out."""
        config = dataclasses.asdict(self.config)
        free = ("val", "num_workers", "prefetch_factor", "decoder", "max_bad_fraction")
        kept = {key: value for key, value in config.items() if key not in free}
        for dataset in kept["train"]:
            dataset.pop("path"), dataset.pop("catalogue")
        state = [kept, [c.fingerprint for c in self.catalogues], self.seed]
        return xxhash.xxh3_128_hexdigest(json.dumps(state, sort_keys=True).encode())

    def micro_batch(self, step: int, slot: int, exclusions: Iterable[Exclusion] = ()) -> MicroBatch:
        """The samples of one slot of a step; excluded ones are replaced in place.

        Raises:
            ValueError: so much is excluded that a sample has no replacement.
        """
        if step < 0 or not 0 <= slot < self.num_slots:
            raise ValueError(f"step={step} must be >= 0 and slot={slot} within {self.num_slots}")
        excluded = excluded_at(exclusions, step)
        bucket, turn = interleave(step, self._schedule, (1, 2))
        size = self.config.buckets[bucket].batch_size
        samples = []
        for position in range(turn * size, (turn + 1) * size):
            # Each lane starts the mixture elsewhere, so that every step holds the whole mixture.
            phase = (2 * slot + 1, 2 * self.num_slots)
            dataset, index = interleave(position, self._mixture[bucket], phase)
            place = self.lanes[dataset].locate(bucket, slot, index)
            sample = self._train_sample(dataset, place, bucket)
            if sample.sample_id in excluded:
                sample = self.replacement(sample, excluded)
            samples.append(sample)
        return MicroBatch(step, slot, samples, self._cost(bucket, size))

    def step(self, step: int, exclusions: Iterable[Exclusion] = ()) -> list[MicroBatch]:
        """All micro-batches of a step, slot by slot."""
        exclusions = tuple(exclusions)
        return [self.micro_batch(step, slot, exclusions) for slot in range(self.num_slots)]

    def replacement(self, sample: PlannedSample, excluded: Collection[int]) -> PlannedSample:
        """The sample that stands in for `sample`: the first candidate of a hash of (seed,
        sample_id, visit, i) in the same bucket and lane (then the same bucket) not excluded.

        Raises:
            ValueError: no candidate is left.
        """
        original = sample.sample_id if sample.replaces is None else sample.replaces
        lanes = self.lanes[sample.dataset]
        for number in range(_CANDIDATES):
            start, stop = sample.segment
            if number >= _CANDIDATES_IN_LANE:
                start, stop = 0, int(lanes.totals[sample.bucket])
            draw = derive_seed(self.seed, "replacement", original, sample.visit, number)
            row = lanes.row_at(sample.bucket, sample.visit, start + draw % (stop - start))
            sample_id = int(self._columns[sample.dataset]["sample_id"][row])
            if sample_id in excluded or sample_id == original:
                continue
            place = Place(row, sample.visit, sample.segment)
            found = self._train_sample(sample.dataset, place, sample.bucket, original)
            return dataclasses.replace(found, replaces=original)
        raise ValueError(
            f"no replacement is left for sample {sample.key!r} in bucket "
            f"{self.config.buckets[sample.bucket].name}: {len(excluded)} samples are excluded"
        )

    def bad_fraction(self, exclusions: Iterable[Exclusion]) -> float:
        """Share of the eligible samples that exclusions name; compare with max_bad_fraction."""
        return len({e.sample_id for e in exclusions}) / self.num_samples

    def summary(self) -> str:
        """Samples, drops and buckets, for the start of a run."""
        lines = self._drops()
        total = sum(self._schedule)
        for index, (bucket, weight) in enumerate(
            zip(self.config.buckets, self._schedule, strict=True)
        ):
            samples = sum(int(lanes.totals[index]) for lanes in self.lanes)
            lines.append(
                f"bucket {bucket.name}: {samples} samples, {weight / total:.1%} of steps, "
                f"{self.num_slots} x {bucket.batch_size} a step, "
                f"cost {self._cost(index, bucket.batch_size):.3g} a slot"
            )
        return "\n".join(lines)

    def _train_sample(
        self, dataset: int, place: Place, bucket: int, replaces: int | None = None
    ) -> PlannedSample:
        sample_id = int(self._columns[dataset]["sample_id"][place.row])
        parts = (self.seed, sample_id, place.visit)
        seed = derive_seed(*parts) if replaces is None else derive_seed(*parts, replaces)
        return self._sample(
            dataset, place, bucket, seed, crop=self.config.crop, window=self.config.window
        )

    def _check_buckets_fill(self) -> None:
        for index, bucket in enumerate(self.config.buckets):
            found = sum(int(lanes.totals[index]) for lanes in self.lanes)
            needed = self.num_slots * bucket.batch_size
            if found < needed:
                latents = any(bool((e.bucket >= 0).any()) and _is_latent(e) for e in self.eligible)
                remedy = "encode it with `longtake encode`, " if latents else ""
                raise ValueError(
                    f"data.buckets[{index}] {bucket.name} can never fill: {found} samples fit it, "
                    f"one step needs {self.num_slots} micro-batches of {bucket.batch_size}; "
                    f"{remedy}remove the bucket, or lower its batch_size or "
                    f"data.micro_batches_per_step\n" + "\n".join(self._drops())
                )

    def _shares(self) -> tuple[list[list[int]], list[int]]:
        """Integer shares: of datasets within each bucket, and of buckets among the steps."""
        weights = [Fraction(e.config.weight).limit_denominator(10**6) for e in self.eligible]
        unit = math.lcm(*(weight.denominator for weight in weights))
        mixture = [
            [
                int(weight * unit) * int(lanes.totals[index])
                for weight, lanes in zip(weights, self.lanes, strict=True)
            ]
            for index in range(len(self.config.buckets))
        ]
        sizes = [bucket.batch_size for bucket in self.config.buckets]
        common = math.lcm(*sizes)
        schedule = [sum(m) * (common // s) for m, s in zip(mixture, sizes, strict=True)]
        return mixture, schedule


class ValPlan(_Samples):
    """A fixed pass over `num_samples` samples of `config.val`, bucket by bucket.

    They are the first ones of each bucket of each dataset, dealt in turn, so that none goes unseen.
    Crops and windows are central and seeds constant, so that passes compare.
    """

    def __init__(
        self, catalogues: Sequence[Catalogue], config: DataConfig, seed: int, num_samples: int
    ) -> None:
        super().__init__(catalogues, config.val, config, seed)
        self.num_samples = num_samples

    @classmethod
    def from_config(cls, config: DataConfig, seed: int, num_samples: int) -> "ValPlan":
        """The validation plan of a config, its catalogues loaded."""
        check_data_config(config)
        return cls(open_catalogues(config.val), config, seed, num_samples)

    def micro_batches(self, rank: int, num_ranks: int) -> list[MicroBatch]:
        """This rank's share. All ranks get equally many batches of the same shapes in the same
        order; a rank without one repeats the bucket's first with counted=False.
        """
        rows = self._dealt_rows()
        batches: list[MicroBatch] = []
        for bucket, shape in enumerate(self.config.buckets):
            samples = [
                self._val_sample(dataset, row, bucket)
                for dataset, row in rows
                if self.eligible[dataset].bucket[row] == bucket
            ]
            size = shape.batch_size
            groups = [samples[i : i + size] for i in range(0, len(samples), size)]
            for start in range(0, len(groups), num_ranks):
                index = start + rank
                counted = index < len(groups)
                group = groups[index] if counted else groups[0]
                cost = self._cost(bucket, len(group))
                batches.append(MicroBatch(len(batches), rank, group, cost, counted))
        return batches

    def _dealt_rows(self) -> list[tuple[int, int]]:
        """(dataset, row) of the samples of a pass, in the order of datasets and rows."""
        dealt = [
            (turn, dataset, bucket, int(row))
            for dataset, eligible in enumerate(self.eligible)
            for bucket in range(len(self.config.buckets))
            for turn, row in enumerate(np.flatnonzero(eligible.bucket == bucket))
        ]
        taken = sorted(dealt)[: self.num_samples]
        return sorted((dataset, row) for _, dataset, _, row in taken)

    def _val_sample(self, dataset: int, row: int, bucket: int) -> PlannedSample:
        sample_id = int(self._columns[dataset]["sample_id"][row])
        seed = derive_seed(self.seed, "val", sample_id)
        place = Place(row, 0, (0, 0))
        return self._sample(dataset, place, bucket, seed, crop="center", window="center")


def clip_times(
    *, frames: int, fps: float, duration: float, length: int, target_fps: float | None, part: float
) -> tuple[float, tuple[float, ...]]:
    """Frame rate and presentation times (seconds) of `length` frames out of a clip.

    `part` in [0, 1] says which of the possible starting frames is taken.
    """
    rate = target_fps or fps
    if fps <= 0 or rate <= 0:  # an image
        return rate, (0.0,) * length
    if target_fps is None:
        free = frames - length
    else:
        free = int((duration - 1 / fps - (length - 1) / target_fps) * fps + 1e-2)
    start = min(int(part * (free + 1)), free) / fps if free > 0 else 0.0
    return rate, tuple(start + index / rate for index in range(length))


def _shard_numbers(eligible: Eligible) -> np.ndarray:
    shards: Any = eligible.catalogue.table.column("shard").combine_chunks()
    return shards.dictionary_encode().indices.to_numpy()


def _is_latent(eligible: Eligible) -> bool:
    return eligible.catalogue.table.column("lt").null_count < len(eligible.catalogue)
