"""What is drawn for a sample of a step: its window in time, its crop, its caption."""

from collections.abc import Sequence

from longtake.data.config import DataConfig, DatasetConfig
from longtake.data.plan.lanes import Place
from longtake.data.plan.planned import PlannedSample
from longtake.data.plan.tables import Record, SampleTable
from longtake.data.randomness import uniform


class Draws:
    """Fills in planned samples; `tables` and `datasets` are in the same order."""

    def __init__(
        self, tables: Sequence[SampleTable], datasets: Sequence[DatasetConfig], config: DataConfig
    ) -> None:
        self.tables, self._datasets, self._config = tables, datasets, config

    def sample(
        self,
        dataset: int,
        place: Place,
        record: Record,
        bucket: int,
        seed: int,
        *,
        augment: bool,
    ) -> PlannedSample:
        """Fill in everything about the sample of `record` that is drawn from its seed: window, crop
        and flip as the config says, or with `augment` False the centre."""
        shape = self._config.buckets[bucket]
        window = self._config.window if augment else "center"
        random_crop = augment and self._config.crop == "random"
        rate, times = clip_times(
            frames=record.frames,
            fps=record.fps,
            duration=record.duration,
            length=shape.frames,
            target_fps=self._config.fps,
            part=uniform(seed, "times") if window == "random" else float(window == "center") / 2,
        )
        at = (uniform(seed, "crop.y"), uniform(seed, "crop.x")) if random_crop else (0.5, 0.5)
        return PlannedSample(
            dataset=dataset,
            row=place.row,
            sample_id=record.sample_id,
            key=self.tables[dataset].key(record),
            visit=place.visit,
            shape=(shape.frames, shape.height, shape.width),
            times=times,
            fps=rate,
            crop=at,
            flip=augment and self._config.flip and uniform(seed, "flip") < 0.5,
            caption_kind=self._caption_kind(dataset, record.kinds, seed),
            seed=seed,
            bucket=bucket,
            segment=place.segment,
        )

    def _caption_kind(self, dataset: int, kinds: int, seed: int) -> str:
        shares = [
            (kind, share)
            for bit, (kind, share) in enumerate(sorted(self._datasets[dataset].captions.items()))
            if share > 0 and kinds >> bit & 1
        ]
        if len(shares) == 1:
            return shares[0][0]
        left = uniform(seed, "caption") * sum(share for _, share in shares)
        for kind, share in shares:
            left -= share
            if left < 0:
                return kind
        return shares[-1][0]


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
