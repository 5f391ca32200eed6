"""Rows of the catalogue: what is known of each sample of a shard without decoding a frame."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from safetensors import SafetensorError, deserialize

from longtake.data.decode import DecodeError, probe
from longtake.data.samples import (
    LATENT_EXTENSION,
    MAX_NUMBER,
    NoCaptionError,
    SampleError,
    SampleMeta,
    parse_meta,
    pick_members,
)
from longtake.data.shards import SampleEntry, ShardReader, Span, scan_shard

SCHEMA_VERSION = 1

SCHEMA = pa.schema(
    [
        ("sample_id", pa.uint64()),
        ("source_id", pa.uint64()),
        ("key", pa.string()),
        ("shard", pa.string()),
        ("ext", pa.string()),
        ("payload_offset", pa.int64()),
        ("payload_size", pa.int64()),
        ("meta_ext", pa.string()),
        ("meta_offset", pa.int64()),
        ("meta_size", pa.int64()),
        ("xxh3", pa.string()),
        ("meta_xxh3", pa.string()),
        ("frames", pa.int32()),
        ("fps", pa.float32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("duration", pa.float32()),
        ("codec", pa.string()),
        ("keyframe_interval", pa.float32()),
        ("caption_chars", pa.map_(pa.string(), pa.int32())),
        ("licence", pa.string()),
        ("split", pa.string()),
        ("family", pa.string()),
        ("scores", pa.map_(pa.string(), pa.float64())),
        ("lt", pa.int32()),
        ("lh", pa.int32()),
        ("lw", pa.int32()),
    ]
)


@dataclass
class ShardIndex:
    """What one shard holds: rows for SCHEMA, and samples that cannot be used with their reasons."""

    name: str
    num_bytes: int
    rows: list[dict[str, Any]]
    rejected: list[dict[str, str]]

    @property
    def digest(self) -> str:
        """xxh3-128 (hex) of the rows."""
        text = json.dumps(self.rows, sort_keys=True, ensure_ascii=True)
        return xxhash.xxh3_128_hexdigest(text.encode())


def content_hash(data: bytes) -> str:
    """xxh3-128 of a member, as the catalogue stores it."""
    return xxhash.xxh3_128_hexdigest(data)


def name_hash(dataset: str, name: str) -> int:
    """64-bit id of a sample or of its source within a dataset."""
    return xxhash.xxh3_64_intdigest(f"{dataset}/{name}".encode())


def index_shard(path: Path, dataset: str) -> ShardIndex:
    """Scan one shard and probe its headers.

    Raises:
        ShardError: the tar itself is damaged, empty or unsafe.
    """
    reader = ShardReader()
    index = ShardIndex(path.name, path.stat().st_size, [], [])
    try:
        for entry in scan_shard(path):
            try:
                index.rows.append(_row(entry, path, dataset, reader))
            except (SampleError, DecodeError) as error:
                reason = {"key": entry.key, "shard": path.name, "reason": str(error)}
                index.rejected.append(reason)
    finally:
        reader.close()
    return index


def _row(entry: SampleEntry, path: Path, dataset: str, reader: ShardReader) -> dict[str, Any]:
    spelled, metas = pick_members(entry.members)
    ext, payload_span = spelled.lower(), entry.members[spelled]
    meta_ext, meta_span, meta_bytes, meta = _read_meta(entry, metas, path, reader)
    payload = reader.read(path, payload_span)
    return {
        "sample_id": name_hash(dataset, entry.key),
        "source_id": name_hash(dataset, meta.text("source_id") or entry.key),
        "key": entry.key,
        "shard": path.name,
        "ext": ext,
        "payload_offset": payload_span.offset,
        "payload_size": payload_span.size,
        "meta_ext": meta_ext,
        "meta_offset": meta_span.offset,
        "meta_size": meta_span.size,
        "xxh3": content_hash(payload),
        "meta_xxh3": content_hash(meta_bytes),
        "caption_chars": [(kind, len(caption)) for kind, caption in meta.captions.items()],
        "licence": meta.text("licence"),
        "split": meta.text("split"),
        "family": meta.text("family"),
        "scores": [(name, score) for name, score in meta.scores().items()],
        **(_latent_facts(payload, meta) if ext == LATENT_EXTENSION else _video_facts(payload)),
    }


def _read_meta(
    entry: SampleEntry, metas: list[str], path: Path, reader: ShardReader
) -> tuple[str, Span, bytes, SampleMeta]:
    """The json, or the txt where the json has no captions: (ext, span, bytes, meaning)."""
    fields: dict[str, Any] = {}
    for spelled in metas:
        ext, span = spelled.lower(), entry.members[spelled]
        data = reader.read(path, span)
        try:
            meta = parse_meta(ext, data)
        except NoCaptionError as error:
            fields = error.fields
            continue
        return ext, span, data, SampleMeta(meta.captions, meta.fields or fields)
    raise NoCaptionError(fields)


def _video_facts(payload: bytes) -> dict[str, Any]:
    info = probe(payload)
    return {
        "frames": info.frames,
        "fps": info.fps,
        "width": info.width,
        "height": info.height,
        "duration": info.duration,
        "codec": info.codec,
        "keyframe_interval": info.keyframe_interval,
        "lt": None,
        "lh": None,
        "lw": None,
    }


def _latent_facts(payload: bytes, meta: SampleMeta) -> dict[str, Any]:
    """Shape of the stored latents; pixel size and rate of the clip come from key.json."""
    try:
        shapes = {name: tensor["shape"] for name, tensor in deserialize(payload)}
    except SafetensorError as error:
        raise SampleError(f"the safetensors file is damaged: {error}") from None
    if len(shapes.get("latents", [])) != 4:
        raise SampleError("the safetensors file holds no tensor 'latents' of shape (C, T, H, W)")
    frames, fps = int(meta.number("frames")), meta.number("fps")
    _, lt, lh, lw = shapes["latents"]
    if max(lt, lh, lw) > MAX_NUMBER:
        raise SampleError(f"latents of shape {tuple(shapes['latents'])} are beyond all use")
    return {
        "frames": frames,
        "fps": fps,
        "width": int(meta.number("width")),
        "height": int(meta.number("height")),
        "duration": frames / fps if fps > 0 else 0.0,
        "codec": "latents",
        "keyframe_interval": 0.0,
        "lt": lt,
        "lh": lh,
        "lw": lw,
    }
