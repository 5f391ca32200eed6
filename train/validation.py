"""The fixed validation pass of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from longtake.data.loader import Batch, read_batches
from longtake.data.plan.val_plan import ValPlan
from longtake.train.ranks import Ranks
from longtake.train.read_once import read_once
from longtake.train.schema import DiTRun, VAERun


@dataclass(frozen=True)
class Validation:
    """The fixed validation pass, read anew each time: it may not fit in memory."""

    plan: ValPlan | None
    config: VAERun | DiTRun
    ranks: Ranks
    left_out: dict[int, str] = field(default_factory=dict)  # samples that could not be read: why

    def batches(self) -> Iterator[Batch]:
        """This rank's share; as many batches of the same shapes on every rank."""
        return self._read(self.ranks.data_rank, self.ranks.num_data_ranks)

    def head(self) -> list[Batch]:
        """The first validation.num_videos clips of one shape, the longest that can be read, alike
        on all ranks."""
        head: list[Batch] = []
        missing = self.config.validation.num_videos
        for batch in self._read(0, 1, longest_first=True) if missing else ():
            shape = batch.clips[0].sample.shape if batch.counted else None
            if missing <= 0 or (head and shape != head[0].clips[0].sample.shape):
                break
            if shape is not None:
                head.append(replace(batch, clips=batch.clips[:missing]))
                missing -= len(batch.clips)
        return head

    def _read(
        self, data_rank: int, num_data_ranks: int, *, longest_first: bool = False
    ) -> Iterator[Batch]:
        if self.plan is None:
            return
        micro_batches = self.plan.micro_batches(data_rank, num_data_ranks)
        if longest_first:
            micro_batches.sort(key=lambda batch: -batch.samples[0].shape[0])
        batches = read_batches(self.plan.tables, self.plan.config, micro_batches)
        for batch in read_once(batches, len(micro_batches), self.ranks):
            self.left_out.update({bad.sample_id: bad.reason for bad in batch.excluded})
            yield batch
