"""Small shards and catalogues for the data tests, made in memory or in a temporary folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from longtake.data.catalogue import Catalogue, build_catalogue
from longtake.data.catalogue.indexing import SCHEMA, name_hash
from longtake.data.decode import encode_video
from longtake.data.shards import ShardWriter


def toy_frames(
    index: int, frames: int = 9, height: int = 32, width: int = 32, shade: int = 0
) -> np.ndarray:
    """A coloured square that moves over grey, uint8 (T, H, W, 3)."""
    clip = np.full((frames, height, width, 3), 110 + shade, dtype=np.uint8)
    colour = [(220, 30, 40), (30, 190, 60), (40, 60, 220), (230, 210, 40)][index % 4]
    for time in range(frames):
        x = (index + 2 * time) % (width - 8)
        clip[time, 8:16, x : x + 8] = colour
    return clip


def toy_video(index: int, frames: int = 9, height: int = 32, width: int = 32) -> bytes:
    """The same as mp4 at 8 fps."""
    return encode_video(toy_frames(index, frames, height, width), 8)


def toy_meta(index: int, **fields: Any) -> bytes:
    """key.json of a toy clip."""
    captions = {"dense": f"square number {index} moves right", "short": f"square {index}"}
    return json.dumps({"captions": captions, "split": "train", **fields}).encode()


def write_shards(
    folder: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]], max_samples: int = 8
) -> Path:
    """Write samples given as (key, members)."""
    with ShardWriter(folder, max_samples=max_samples) as writer:
        for key, members in samples:
            writer.write(key, members)
    return folder


def toy_dataset(folder: Path, num_clips: int = 24, max_samples: int = 8, **size: int) -> Catalogue:
    """Indexed shards of `num_clips` good clips of 9 frames, 32 x 32, 8 fps."""
    samples = [
        (f"clip{i:04d}", {"mp4": toy_video(i, **size), "json": toy_meta(i)})
        for i in range(num_clips)
    ]
    write_shards(folder, samples, max_samples)
    return build_catalogue(folder, num_workers=1, progress=False)


def synthetic_catalogue(
    shard_sizes: Sequence[int],
    shapes: Sequence[tuple[int, int, int]],
    *,
    dataset: str = "toy",
    fps: float = 8.0,
    seed: int = 0,
) -> Catalogue:
    """A catalogue without files: rows take random (T, H, W) of `shapes`."""
    shards = np.repeat(np.arange(len(shard_sizes)), shard_sizes)
    count = len(shards)
    picks = np.random.default_rng(seed).integers(0, len(shapes), count)
    frames, height, width = np.array(shapes)[picks].T.reshape(3, count)
    keys = [f"k{i:06d}" for i in range(count)]
    columns: dict[str, Any] = {
        name: pa.nulls(count, SCHEMA.field(name).type) for name in SCHEMA.names
    }
    columns |= {
        "sample_id": [name_hash(dataset, key) for key in keys],
        "source_id": [name_hash(dataset, key) for key in keys],
        "key": keys,
        "xxh3": [f"{i:032x}" for i in range(count)],
        "meta_xxh3": [f"{i:032x}" for i in range(count)],
        "meta_ext": ["json"] * count,
        "payload_size": np.random.default_rng(seed + 1).integers(1, 10**6, count),
        "meta_size": np.full(count, 300),
        "shard": [f"shard-{i:06d}.tar" for i in shards],
        "ext": ["mp4"] * count,
        "codec": ["h264"] * count,
        "frames": frames,
        "height": height,
        "width": width,
        "fps": np.full(count, fps),
        "duration": frames / fps,
        "caption_chars": [[("dense", 10), ("short", 3)]] * count,
        **{name: np.zeros(count, dtype=np.int64) for name in ("payload_offset", "meta_offset")},
    }
    table = pa.table([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)
    return Catalogue(Path("nowhere"), table, dataset, f"synthetic-{dataset}-{seed}-{count}")
