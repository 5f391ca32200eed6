"""Which bucket each sample of a catalogue goes to, and why others are dropped."""

from collections import Counter
from collections.abc import Collection

import numpy as np
import pyarrow as pa

from longtake.data.config import DataConfig
from longtake.data.randomness import uniforms

_SLACK = 1e-3  # seconds, as in the decoder
_DROPPED = -1


def assign_buckets(
    rows: np.ndarray, config: DataConfig, closed: Collection[int] = ()
) -> tuple[np.ndarray, Counter[str]]:
    """The bucket of nearest aspect ratio for each of `rows` (N,) of tables.ROW: (N,) int16, -1
    where none fits, and the number of those by reason.

    Among equals the longest frame count that fits wins, then the largest frame; clips are never
    stretched in time nor enlarged. A sample for which data.lengths draw a frame count goes to a
    bucket of that, if one fits; the same one in every plan of the same lengths. Cached latents fit
    the bucket of exactly their pixel shape. Buckets whose index is in `closed` take nothing.
    """
    bucket = np.full(len(rows), _DROPPED, dtype=np.int16)
    reasons = np.zeros(len(rows), dtype=np.int8)
    pixels, latents = np.flatnonzero(~rows["latent"]), np.flatnonzero(rows["latent"])
    if len(pixels):
        bucket[pixels], reasons[pixels] = _fit_pixels(rows[pixels], config, closed)
    if len(latents):
        bucket[latents], reasons[latents] = _fit_latents(rows[latents], config, closed)
    texts = (
        *("frame smaller than every bucket of its length", "clip shorter than every bucket"),
        f"frame rate below data.fps={config.fps}",
        "fits only buckets that cannot fill a step",
        "encoded at a shape that no bucket has (run `longtake encode` again)",
    )
    numbers = np.bincount(reasons[bucket == _DROPPED], minlength=len(texts))
    return bucket, Counter({t: int(n) for t, n in zip(texts, numbers, strict=True) if n})


def _fit_pixels(
    rows: np.ndarray, config: DataConfig, closed: Collection[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Bucket of each video or image, and why none fits: 0 too small, 1 too short, 2 too slow, 3
    closed."""
    frames, width, height = rows["frames"], rows["width"], rows["height"]
    fps = rows["fps"].astype(np.float64)
    last_time = rows["duration"] - 1 / np.where(fps > 0, fps, np.inf)
    aspect = np.log(width / height)
    bucket = np.full(len(rows), _DROPPED, dtype=np.int16)
    drawn = _drawn_lengths(rows["sample_id"], config)
    # not of the drawn length, aspect distance, -frames, -area: less is better
    best = np.full((4, len(rows)), np.inf)
    long_enough = np.zeros(len(rows), dtype=bool)
    fast_enough = np.zeros(len(rows), dtype=bool)
    fits_closed = np.zeros(len(rows), dtype=bool)
    for index, shape in enumerate(config.buckets):
        if shape.frames == 1:
            is_fast = is_long = np.ones(len(rows), dtype=bool)
        elif config.fps is None:
            is_fast, is_long = fps > 0, frames >= shape.frames
        else:
            is_fast = fps >= 0.99 * config.fps
            is_long = last_time + _SLACK >= (shape.frames - 1) / config.fps
        is_large = (width >= shape.width) & (height >= shape.height)
        distance = np.round(np.abs(aspect - np.log(shape.width / shape.height)), 6)
        area = shape.height * shape.width
        scores = drawn != shape.frames, distance, -shape.frames, -area
        score = np.stack(np.broadcast_arrays(*scores)).astype(np.float64)
        fast_enough |= is_fast
        long_enough |= is_fast & is_long
        if index in closed:
            fits_closed |= is_fast & is_long & is_large
            continue
        better = is_fast & is_long & is_large & _precedes(score, best)
        best[:, better] = score[:, better]
        bucket[better] = index
    why = np.select([fits_closed, ~fast_enough, ~long_enough], [3, 2, 1], 0)
    return bucket, why


def _drawn_lengths(sample_ids: np.ndarray, config: DataConfig) -> np.ndarray:
    """Frame count that data.lengths draw for each sample, (N,), 0 where they leave it open."""
    frames = np.array([length.frames for length in config.lengths] + [0])
    edges = np.cumsum([length.share for length in config.lengths])
    return frames[np.searchsorted(edges, uniforms(sample_ids, "length"), side="right")]


def _precedes(score: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Lexicographic score < best, column by column; both (K, N)."""
    found = np.zeros(score.shape[1], dtype=bool)
    for mine, other in zip(score[::-1], best[::-1], strict=True):
        found = (mine < other) | ((mine == other) & found)
    return found


def _fit_latents(
    rows: np.ndarray, config: DataConfig, closed: Collection[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Bucket of each sample of latents, and why none fits: 3 closed, 4 there is none."""
    found = np.full(len(rows), _DROPPED, dtype=np.int16)
    why = np.full(len(rows), 4, dtype=np.int8)
    for index, shape in enumerate(config.buckets):
        same = (rows["height"] == shape.height) & (rows["width"] == shape.width)
        same &= rows["frames"] == shape.frames
        if index in closed:
            why[same] = 3
        else:
            found[same] = index
    return found, why


def caption_kinds(table: pa.Table, kinds: list[str]) -> np.ndarray:
    """(N,) uint16: bit i set where a catalogue row has a caption of the i-th kind."""
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
