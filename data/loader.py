"""From planned samples to batches, in this process or in workers, always the same ones.

A sample that cannot be read (damaged, changed since indexing, caption unreadable) is replaced in
place by the plan's rule and reported in Batch.excluded; the next ones are not shifted.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import torch
import xxhash
from torch import Tensor

from longtake.data.config import DataConfig
from longtake.data.plan import Plan
from longtake.data.plan.planned import Exclusion, MicroBatch, PlannedSample, excluded_at
from longtake.data.plan.tables import SampleTable
from longtake.data.reader import BadSample, Clip, SampleReader
from longtake.data.shards.storage import is_remote
from longtake.data.transforms import to_float
from longtake.data.workers import Ahead, Workers

__all__ = ["Batch", "Clip", "Loader", "read_batches"]


class Position(NamedTuple):
    """Where a micro-batch belongs."""

    step: int
    slot: int

    def __str__(self) -> str:
        return f"step {self.step}, slot {self.slot}"


# Micro-batches whose remote samples a reader has under way: a store answers in 0.1 s or so.
_POSITIONS_AHEAD = 8


@dataclass
class Batch:
    """The clips of one micro-batch, and the samples that had to be left out of it; `digest` is the
    xxh3-64 (hex) of the clips, draws and pixels included."""

    step: int
    slot: int
    clips: list[Clip]
    excluded: list[Exclusion] = field(default_factory=list)
    counted: bool = True
    digest: str = ""

    @property
    def samples(self) -> list[PlannedSample]:
        """What the plan says of each clip."""
        return [clip.sample for clip in self.clips]

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


def digest_clips(clips: Sequence[Clip]) -> str:
    """xxh3-64 (hex) of all that clips hand to the model, and of the seeds of its draws."""
    state = xxhash.xxh3_64()
    for clip in clips:
        state.update(json.dumps(_facts(clip)).encode())
        for tensor in clip.tensors.values():
            state.update(tensor.contiguous().view(torch.uint8).numpy())
    return state.hexdigest()


def _facts(clip: Clip) -> list[Any]:
    return [clip.sample.seed, clip.sample.times, clip.caption, clip.scores]


def chain_digests(previous: str, digests: Iterable[str]) -> str:
    """xxh3-128 (hex) of a history and what is added to it: equal chains saw equal batches."""
    return xxhash.xxh3_128_hexdigest("/".join([previous, *digests]).encode())


class _MicroBatches:
    """Reads micro-batches, alone or as one of `num_readers` that take turns."""

    def __init__(
        self, plan: Plan, slots: range, exclusions: Sequence[Exclusion], num_readers: int
    ) -> None:
        self._plan, self._exclusions = plan, tuple(exclusions)
        self._slots, self._num_readers = slots, num_readers
        self._is_remote = _any_remote(plan.tables)
        self._planned: dict[Position, MicroBatch] = {}
        self._reader = SampleReader(plan.tables, plan.config)

    def read(self, position: Position) -> Batch:
        """The micro-batch of a (step, slot)."""
        planned = self._plan_ahead(position)
        batch = Batch(planned.step, planned.slot, [])
        excluded = excluded_at(self._exclusions, planned.step)
        for sample in planned.samples:
            batch.clips.append(self._clip(sample, excluded, batch))
        batch.digest = digest_clips(batch.clips)
        return batch

    def read_packed(self, position: Position) -> "_Packed":
        """The same, ready to travel."""
        return _Packed(self.read(position))

    def _plan_ahead(self, position: Position) -> MicroBatch:
        """The plan of one position; remote samples of the next ones begin to come."""
        if not self._is_remote:
            return self._plan.micro_batch(*position, self._exclusions)
        coming = [position]
        for _ in range(_POSITIONS_AHEAD):
            coming.append(next_position(coming[-1], self._slots, self._num_readers))
        self._planned = {
            each: self._planned.get(each) or self._plan.micro_batch(*each, self._exclusions)
            for each in coming
        }
        self._reader.prefetch([s for each in self._planned.values() for s in each.samples])
        return self._planned[position]

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
            try:
                sample = self._plan.replacement(sample, excluded)
            except ValueError as error:
                reasons = "".join(f"\n  {e.reason}" for e in batch.excluded[-10:])
                raise ValueError(f"{error}; repair or filter its samples:{reasons}") from None


def next_position(position: Position, slots: range, turns: int) -> Position:
    """The (step, slot) that lies `turns` positions behind another one of a rank's `slots`."""
    step, slot = position
    steps, index = divmod(slot - slots.start + turns, len(slots))
    return Position(step + steps, slots[index])


class _Packed:
    """A batch on its way between processes: a few large tensors, since each one costs a file
    descriptor of shared memory."""

    def __init__(self, batch: Batch) -> None:
        alone = [clip.tensors for clip in batch.clips]
        self._joined: dict[str, Tensor] = {}
        for name in alone[0] if alone else ():
            how = torch.cat if name == "text" else torch.stack
            joined = _join([each.get(name) for each in alone], how)
            if joined is not None:
                self._joined[name] = joined
        self._lengths = [0 if clip.text is None else len(clip.text) for clip in batch.clips]
        nothing = dict.fromkeys(self._joined, _NOTHING)
        self._batch = replace(batch, clips=[clip.with_tensors(nothing) for clip in batch.clips])

    def pin(self) -> Self:
        """In page-locked memory, from where copies to the GPU run beside other work."""
        self._joined = {name: tensor.pin_memory() for name, tensor in self._joined.items()}
        clips = []
        for clip in self._batch.clips:
            alone = {n: t for n, t in clip.tensors.items() if n not in self._joined}
            clips.append(clip.with_tensors({n: t.pin_memory() for n, t in alone.items()}))
        self._batch = replace(self._batch, clips=clips)
        return self

    def unpack(self) -> Batch:
        """The batch as it was."""
        clips = list(self._batch.clips)
        for name, joined in self._joined.items():
            parts = joined.split(self._lengths) if name == "text" else joined.unbind()
            clips = [c.with_tensors({name: p}) for c, p in zip(clips, parts, strict=True)]
        return replace(self._batch, clips=clips)


_NOTHING = torch.empty(0)  # stands where a clip's tensor travels in a joined one


def _join(tensors: Sequence[Tensor | None], how: Any) -> Tensor | None:
    """One tensor where all are there and fit together, else None (they travel one by one)."""
    there = [tensor for tensor in tensors if tensor is not None]
    first = 1 if how is torch.cat else 0
    same = len({(tensor.shape[first:], tensor.dtype) for tensor in there}) == 1
    return how(there) if len(there) == len(tensors) and same else None


class Loader:
    """Batches of a rank's slots for each step from `start_step` on, without end.

    The batches are the same for every number of workers, and for workers that are killed.
    Exclusions are fixed for a loader's life: after quarantining a sample, start another one at the
    next step.
    """

    def __init__(
        self,
        plan: Plan,
        slots: range,
        *,
        start_step: int = 0,
        exclusions: Sequence[Exclusion] = (),
        num_workers: int | None = None,
        pin: bool | None = None,
    ) -> None:
        """`num_workers` defaults to data.num_workers, `pin` (pinned host memory) to whether there
        is a GPU."""
        self._plan, self._slots, self._exclusions = plan, slots, exclusions
        self._start = Position(start_step, slots.start)
        self._num_workers = plan.config.num_workers if num_workers is None else num_workers
        self._pin = torch.cuda.is_available() if pin is None else pin
        self._open: list[Callable[[], None]] = []
        self._workers: Workers[Position, _Packed] | None = None

    def describe(self) -> str:
        """What its workers have in hand and where they stand, for a look at a hang."""
        if self._workers is None:
            return "no workers of this process"
        return f"{self._num_workers} workers\n{self._workers.describe()}"

    def __iter__(self) -> Iterator[list[Batch]]:
        """Starts workers, which end with the iteration.

        Raises:
            ChildProcessError: a worker died several times over one (step, slot).
            StorageError: remote shards cannot be reached.
        """
        batches: list[Batch] = []
        try:
            for batch in self._batches():
                batches.append(batch)
                if len(batches) == len(self._slots):
                    yield batches
                    batches = []
        finally:
            self.close()

    def close(self) -> None:
        """End the workers; a running iteration cannot go on."""
        while self._open:
            self._open.pop()()

    def _batches(self) -> Iterator[Batch]:
        work = _MicroBatches(self._plan, self._slots, self._exclusions, max(1, self._num_workers))
        if self._num_workers:
            packed: Iterator[_Packed] = self._from_workers(work)
        elif self._pin:
            packed = map(work.read_packed, self._positions())
        else:
            return map(work.read, self._positions())
        if self._pin:
            packed = self._pinned(packed)
        return map(_Packed.unpack, packed)

    def _from_workers(self, work: _MicroBatches) -> Iterator["_Packed"]:
        self._workers = Workers(
            work.read_packed,
            self._positions(),
            num_workers=self._num_workers,
            ahead=self._plan.config.prefetch_factor,
        )
        self._open.append(self._workers.close)
        return iter(self._workers)

    def _pinned(self, packed: Iterator["_Packed"]) -> Iterator["_Packed"]:
        """Pinning copies: in a thread, beside the training step."""
        ahead = Ahead(map(_Packed.pin, packed), 2 * len(self._slots))
        self._open.append(ahead.close)
        return iter(ahead)

    def _positions(self) -> Iterator[Position]:
        position = self._start
        while True:
            yield position
            position = next_position(position, self._slots, 1)


def read_batches(
    tables: Sequence[SampleTable], config: DataConfig, micro_batches: Sequence[MicroBatch]
) -> Iterator[Batch]:
    """Batches of a validation plan. A sample that cannot be read is left out, not replaced: the
    pass stays the same at every number of ranks. A batch that loses all its clips stands in with
    one of another batch and is not counted: every rank must run its model as often as the others.

    Raises:
        ValueError: not one sample of the pass can be read.
    """
    reader = SampleReader(tables, config)
    fetches_ahead = _any_remote(tables)
    spare: Clip | None = None
    for number, planned in enumerate(micro_batches):
        if fetches_ahead:
            coming = micro_batches[number : number + _POSITIONS_AHEAD]
            reader.prefetch([sample for each in coming for sample in each.samples])
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


def _any_remote(tables: Sequence[SampleTable]) -> bool:
    return any(is_remote(table.root) for table in tables)


def _first_readable(reader: SampleReader, micro_batches: Sequence[MicroBatch]) -> Clip:
    reason = "it is empty"
    for planned in micro_batches:
        for sample in planned.samples:
            try:
                return reader.read(sample)
            except BadSample as error:
                reason = f"{sample.key}: {error}"
    raise ValueError(f"data.val: no sample can be read, the last one because {reason}")
