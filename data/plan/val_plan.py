"""The validation plan: one fixed pass, the same at any number of ranks."""

from collections.abc import Collection, Sequence

import numpy as np

from longtake.data.catalogue import Catalogue
from longtake.data.config import DataConfig, check_data_config
from longtake.data.plan.compile import build_tables, open_tables
from longtake.data.plan.costs import micro_batch_size, resolve_buckets, sample_cost
from longtake.data.plan.draws import Draws
from longtake.data.plan.lanes import Place
from longtake.data.plan.planned import MicroBatch, PlannedSample
from longtake.data.plan.tables import SampleTable
from longtake.data.randomness import derive_seed


class ValPlan:
    """A fixed pass over `num_samples` samples of `config.val`, bucket by bucket.

    They are the first ones of each bucket of each dataset, dealt in turn, so that none goes unseen.
    Crops and windows are central and seeds constant, so that passes compare.
    """

    def __init__(
        self, tables: Sequence[SampleTable], config: DataConfig, seed: int, num_samples: int
    ) -> None:
        """`config` is resolved, and the tables were compiled with it."""
        self.tables, self.config, self.seed = list(tables), config, seed
        self.num_samples = num_samples
        self._draws = Draws(self.tables, config.val, config)

    @classmethod
    def from_config(
        cls, config: DataConfig, seed: int, num_samples: int, closed: Collection[int] = ()
    ) -> "ValPlan":
        """The validation plan of a config, its tables compiled or taken from the cache; buckets
        that are `closed` in training take nothing here either."""
        check_data_config(config, "val")
        config = resolve_buckets(config)
        tables = open_tables(config.val, config, must_fill=False, closed=closed)
        return cls(tables, config, seed, num_samples)

    @classmethod
    def from_catalogues(
        cls, catalogues: Sequence[Catalogue], config: DataConfig, seed: int, num_samples: int
    ) -> "ValPlan":
        """The validation plan over catalogues in memory, in the order of `config.val`."""
        check_data_config(config, "val")
        config = resolve_buckets(config)
        tables = build_tables(catalogues, config.val, config, must_fill=False)
        return cls(tables, config, seed, num_samples)

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
                if self.tables[dataset].bucket[row] == bucket
            ]
            size = micro_batch_size(shape, self.config)
            groups = [samples[i : i + size] for i in range(0, len(samples), size)]
            for start in range(0, len(groups), num_ranks):
                index = start + rank
                counted = index < len(groups)
                group = groups[index] if counted else groups[0]
                cost = len(group) * sample_cost(shape, self.config.cost)
                batches.append(MicroBatch(len(batches), rank, group, cost, counted))
        return batches

    def _dealt_rows(self) -> list[tuple[int, int]]:
        """(dataset, row) of the samples of a pass, in the order of datasets and rows."""
        dealt = [
            (turn, dataset, bucket, int(row))
            for dataset, table in enumerate(self.tables)
            for bucket in range(len(self.config.buckets))
            for turn, row in enumerate(np.flatnonzero(table.bucket == bucket)[: self.num_samples])
        ]
        taken = sorted(dealt)[: self.num_samples]
        return sorted((dataset, row) for _, dataset, _, row in taken)

    def _val_sample(self, dataset: int, row: int, bucket: int) -> PlannedSample:
        record = self.tables[dataset].record(row)
        seed = derive_seed(self.seed, "val", record.sample_id)
        place = Place(row, 0, (0, 0))
        return self._draws.sample(dataset, place, record, bucket, seed, augment=False)
