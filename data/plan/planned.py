"""What a plan says: samples, micro-batches, and the samples it must do without."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class PlannedSample:
    """One sample of one step, fully determined before a byte is read.

    `row` is its row in the filtered catalogue of `dataset`; `shape` (T, H, W); `times` are seconds
    from the clip's first frame; `crop` (y, x) fractions of the free space; `flip` mirrors left to
    right; `seed` is the root of all its random draws. `replaces` is the sample_id that an exclusion
    took out.
    """

    dataset: int
    row: int
    sample_id: int
    key: str
    visit: int
    shape: tuple[int, int, int]
    times: tuple[float, ...]
    fps: float
    crop: tuple[float, float]
    flip: bool
    caption_kind: str
    seed: int
    bucket: int
    segment: tuple[int, int]
    replaces: int | None = None


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go through the model together. `cost` as of `costs.sample_cost`, summed.

    `counted` is False for filling that keeps ranks in step in validation and must not be scored.
    """

    step: int
    slot: int
    samples: list[PlannedSample]
    cost: float
    counted: bool = True


@dataclass(frozen=True)
class Exclusion:
    """A sample that no step from `from_step` on may use."""

    sample_id: int
    from_step: int
    reason: str


def excluded_at(exclusions: Iterable[Exclusion], step: int) -> frozenset[int]:
    """Ids of the samples that `step` must do without."""
    return frozenset(e.sample_id for e in exclusions if e.from_step <= step)
