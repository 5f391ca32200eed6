"""Which bucket each sample of a catalogue goes to, and why others are dropped."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from longtake.data.catalogue import Catalogue, column
from longtake.data.plan_config import BucketConfig, DataConfig, DatasetConfig

_SLACK = 1e-3  # seconds, as in the decoder
_DROPPED = -1


@dataclass(frozen=True)
class Eligible:
    """Samples of one filtered dataset. `bucket` is (N,) int16, -1 where no bucket fits;
    bit i of `kinds` (N,) uint16 says that the i-th caption kind of the config is there."""

    catalogue: Catalogue
    config: DatasetConfig
    bucket: np.ndarray
    kinds: np.ndarray
    dropped: dict[str, int]

    @property
    def num_samples(self) -> int:
        """Samples that have a bucket."""
        return int((self.bucket != _DROPPED).sum())


def assign_buckets(catalogue: Catalogue, dataset: DatasetConfig, config: DataConfig) -> Eligible:
    """Filter a catalogue and give each sample the bucket of the nearest aspect ratio.

    Among equals the longest frame count that fits wins, then the largest frame; clips are never
    stretched in time nor enlarged. Cached latents fit the bucket of exactly their pixel shape.

    Raises:
        ValueError: the filter is invalid, or nothing is left.
    """
    report = catalogue.filter(dataset.where)
    table = report.catalogue.table
    kinds = _caption_kinds(table, list(dataset.captions))
    is_latent = column(table, "codec").astype(str) == "latents"
    bucket = np.full(len(kinds), _DROPPED, dtype=np.int16)
    reasons = np.full(len(kinds), "", dtype=object)
    fit_pixels(table, config, bucket, reasons)
    if is_latent.any():
        bucket[is_latent] = _fit_latents(table, config.buckets)[is_latent]
        reasons[is_latent] = "encoded at a shape that no bucket has (run `longtake encode` again)"
    wanted = np.array([share > 0 for share in dataset.captions.values()])
    mask = np.uint16(int((wanted << np.arange(len(wanted))).sum()))
    silent = (kinds & mask) == 0
    bucket[silent] = _DROPPED
    reasons[silent] = f"no caption of kind {', '.join(dataset.captions)}"
    dropped = {f"where {clause}": count for clause, count in report.dropped.items()}
    lost = reasons[bucket == _DROPPED]
    for reason in sorted(set(lost.tolist())):
        dropped[reason] = int((lost == reason).sum())
    if not (bucket != _DROPPED).any():
        raise ValueError(
            f"dataset {catalogue.dataset!r} ({catalogue.root}): no sample of {len(catalogue)} fits "
            f"data.buckets={', '.join(b.name for b in config.buckets)}: {dropped}"
        )
    return Eligible(report.catalogue, dataset, bucket, kinds & mask, dropped)


def fit_pixels(
    table: pa.Table, config: DataConfig, bucket: np.ndarray, reasons: np.ndarray
) -> None:
    """Fill `bucket` and `reasons` in place for samples that are video or images."""
    frames, width, height = (column(table, name) for name in ("frames", "width", "height"))
    fps = column(table, "fps").astype(np.float64)
    last_time = column(table, "duration") - 1 / np.where(fps > 0, fps, np.inf)
    aspect = np.log(width / height)
    best = np.full((3, len(frames)), np.inf)  # aspect distance, -frames, -area: less is better
    long_enough = np.zeros(len(frames), dtype=bool)
    fast_enough = np.zeros(len(frames), dtype=bool)
    for index, shape in enumerate(config.buckets):
        if shape.frames == 1:
            is_fast = is_long = np.ones(len(frames), dtype=bool)
        elif config.fps is None:
            is_fast, is_long = fps > 0, frames >= shape.frames
        else:
            is_fast = fps >= 0.99 * config.fps
            is_long = last_time + _SLACK >= (shape.frames - 1) / config.fps
        is_large = (width >= shape.width) & (height >= shape.height)
        distance = np.round(np.abs(aspect - np.log(shape.width / shape.height)), 6)
        area = shape.height * shape.width
        score = np.stack([distance, *np.broadcast_arrays(-shape.frames, -area, distance)[:2]])
        better = is_fast & is_long & is_large & _precedes(score, best)
        best[:, better] = score[:, better]
        bucket[better] = index
        fast_enough |= is_fast
        long_enough |= is_fast & is_long
    reasons[:] = "frame smaller than every bucket of its length"
    reasons[~long_enough] = "clip shorter than every bucket"
    reasons[~fast_enough] = f"frame rate below data.fps={config.fps}"


def _precedes(score: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Lexicographic score < best, column by column; both (3, N)."""
    less, equal = score < best, score == best
    return less[0] | (equal[0] & (less[1] | (equal[1] & less[2])))


def _fit_latents(table: pa.Table, buckets: Sequence[BucketConfig]) -> np.ndarray:
    frames, width, height = (column(table, name) for name in ("frames", "width", "height"))
    found = np.full(len(frames), _DROPPED, dtype=np.int16)
    for index, shape in enumerate(buckets):
        same = (frames == shape.frames) & (height == shape.height) & (width == shape.width)
        found[same] = index
    return found


def _caption_kinds(table: pa.Table, kinds: list[str]) -> np.ndarray:
    """(N,) uint16 with bit i set where the i-th kind is among the sample's captions."""
    captions: pa.MapArray = pa.chunked_array(table.column("caption_chars").chunks).combine_chunks()
    offsets = captions.offsets.to_numpy()
    parents = np.repeat(np.arange(len(captions)), np.diff(offsets))
    names = captions.keys.slice(offsets[0], offsets[-1] - offsets[0]).dictionary_encode()
    codes = names.indices.to_numpy()
    found = np.zeros(len(captions), dtype=np.uint16)
    for bit, kind in enumerate(kinds):
        for code in [i for i, name in enumerate(names.dictionary.to_pylist()) if name == kind]:
            found[parents[codes == code]] |= np.uint16(1 << bit)
    return found
