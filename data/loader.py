"""From planned samples to batches, in this process or in workers, always the same ones.

A sample that cannot be read (damaged, changed since indexing, caption unreadable) is replaced in
place by the plan's rule and reported in Batch.excluded; the next ones are not shifted.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from longtake.data.catalogue import Catalogue
from longtake.data.plan import DataConfig, Plan
from longtake.data.planned import Exclusion, MicroBatch, PlannedSample, excluded_at
from longtake.data.reader import BadSample, Clip, SampleReader
from longtake.data.transforms import to_float

__all__ = ["Batch", "Clip", "Loader", "read_batches"]


@dataclass
class Batch:
    """The clips of one micro-batch, and the samples that had to be left out of it."""

    step: int
    slot: int
    clips: list[Clip]
    excluded: list[Exclusion] = field(default_factory=list)
    counted: bool = True

    def stack_video(self) -> Tensor:
        """Pixels float32 (B, 3, T, H, W) in [-1, 1].

        Raises:
            ValueError: the clips differ in shape, or hold latents.
        """
        return to_float(_stack([clip.video for clip in self.clips], "video"))

    def stack_latents(self) -> Tensor:
        """Normalised latents float32 (B, C, T, H, W).

        Raises:
            ValueError: the clips differ in shape, or hold pixels.
        """
        return _stack([clip.latents for clip in self.clips], "latents")


def _stack(tensors: Sequence[Tensor | None], name: str) -> Tensor:
    shapes = {None if tensor is None else tuple(tensor.shape) for tensor in tensors}
    if None in shapes:
        raise ValueError(f"the batch holds clips without {name}; data.train mixes kinds of shards")
    if len(shapes) != 1:
        raise ValueError(f"the batch holds {name} of different shapes {shapes}; read clip by clip")
    return torch.stack([tensor for tensor in tensors if tensor is not None])


class _MicroBatches(Dataset[Any]):
    """Map from (step, slot) to the packed batch; what a worker runs."""

    def __init__(self, plan: Plan, exclusions: Sequence[Exclusion]) -> None:
        self._plan, self._exclusions = plan, tuple(exclusions)
        self._reader = SampleReader(plan.catalogues, plan.config)

    def __getitem__(self, position: tuple[int, int]) -> "_Packed":
        step, slot = position
        planned = self._plan.micro_batch(step, slot, self._exclusions)
        batch = Batch(step, slot, [])
        excluded = excluded_at(self._exclusions, step)
        for sample in planned.samples:
            batch.clips.append(self._clip(sample, excluded, batch))
        return _Packed(batch)

    def _clip(self, sample: PlannedSample, excluded: frozenset[int], batch: Batch) -> Clip:
        # Nothing is remembered of earlier failures: what a batch holds must not depend on which
        # worker read what before.
        while True:
            try:
                return self._reader.read(sample)
            except BadSample as error:
                reason = f"{sample.key}: {error}"
            batch.excluded.append(Exclusion(sample.sample_id, batch.step, reason))
            excluded |= {sample.sample_id}
            sample = self._plan.replacement(sample, excluded)


class _Packed:
    """A batch on its way between processes: a few large tensors, since each one costs a file
    descriptor of shared memory."""

    def __init__(self, batch: Batch) -> None:
        self._tensors = {
            "video": _join([clip.video for clip in batch.clips], torch.stack),
            "latents": _join([clip.latents for clip in batch.clips], torch.stack),
            "text": _join([clip.text for clip in batch.clips], torch.cat),
        }
        self._lengths = [0 if clip.text is None else len(clip.text) for clip in batch.clips]
        clips = list(batch.clips)
        for name, joined in self._tensors.items():
            if isinstance(joined, Tensor):
                clips = [replace(clip, **{name: None}) for clip in clips]
        self._batch = replace(batch, clips=clips)

    def unpack(self) -> Batch:
        """The batch as it was."""
        clips = list(self._batch.clips)
        for name, joined in self._tensors.items():
            if isinstance(joined, Tensor):
                parts = joined.split(self._lengths) if name == "text" else joined.unbind()
                clips = [replace(c, **{name: p}) for c, p in zip(clips, parts, strict=True)]
        return replace(self._batch, clips=clips)


def _join(tensors: Sequence[Tensor | None], how: Any) -> Tensor | None:
    """One tensor where all are there and fit together, else None (they travel one by one)."""
    there = [tensor for tensor in tensors if tensor is not None]
    first = 1 if how is torch.cat else 0
    same = len({(tensor.shape[first:], tensor.dtype) for tensor in there}) == 1
    return how(there) if len(there) == len(tensors) and same else None


class Loader:
    """Batches of a rank's slots for each step from `start_step` on, without end.

    The batches are the same for every number of workers. Exclusions are fixed for a loader's life:
    after quarantining a sample, start another one at the next step.
    """

    def __init__(
        self,
        plan: Plan,
        slots: range,
        *,
        start_step: int = 0,
        exclusions: Sequence[Exclusion] = (),
        num_workers: int | None = None,
    ) -> None:
        """`num_workers` defaults to data.num_workers."""
        self._slots, self._start = slots, start_step
        workers = plan.config.num_workers if num_workers is None else num_workers
        self._loader = DataLoader(
            _MicroBatches(plan, exclusions),
            batch_size=None,
            sampler=_Positions(start_step, slots),  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_as_is,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_parent,
            prefetch_factor=plan.config.prefetch_factor if workers else None,
        )

    def __iter__(self) -> Iterator[list[Batch]]:
        batches: list[Batch] = []
        for packed in self._loader:
            batches.append(packed.unpack())
            if len(batches) == len(self._slots):
                yield batches
                batches = []


@dataclass(frozen=True)
class _Positions:
    start: int
    slots: range

    def __iter__(self) -> Iterator[tuple[int, int]]:
        step = self.start
        while True:
            for slot in self.slots:
                yield step, slot
            step += 1


def _leave_signals_to_parent(worker: int) -> None:
    """A scheduler signals every process; the training one finishes its step and needs its data."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _as_is(packed: _Packed) -> _Packed:
    return packed


def read_batches(
    catalogues: Sequence[Catalogue], config: DataConfig, micro_batches: Sequence[MicroBatch]
) -> Iterator[Batch]:
    """Batches of a validation plan. A sample that cannot be read is left out, not replaced: the
    pass stays the same at every number of ranks. A batch that loses all its clips stands in with
    one of another batch and is not counted: every rank must run its model as often as the others.

    Raises:
        ValueError: not one sample of the pass can be read.
    """
    reader = SampleReader(catalogues, config)
    spare: Clip | None = None
    for planned in micro_batches:
        batch = Batch(planned.step, planned.slot, [], counted=planned.counted)
        for sample in planned.samples:
            try:
                batch.clips.append(reader.read(sample))
            except BadSample as error:
                reason = f"{sample.key}: {error}"
                batch.excluded.append(Exclusion(sample.sample_id, planned.step, reason))
        if not batch.clips:
            spare = spare or _first_readable(reader, micro_batches)
            batch.clips, batch.counted = [spare], False
        else:
            spare = batch.clips[0]
        yield batch


def _first_readable(reader: SampleReader, micro_batches: Sequence[MicroBatch]) -> Clip:
    reason = "it is empty"
    for planned in micro_batches:
        for sample in planned.samples:
            try:
                return reader.read(sample)
            except BadSample as error:
                reason = f"{sample.key}: {error}"
    raise ValueError(f"data.val: no sample can be read, the last one because {reason}")
