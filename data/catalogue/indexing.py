"""Rows of the catalogue: what is known of each sample of a shard without decoding a frame."""

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from safetensors import SafetensorError, deserialize

from longtake.data.catalogue.layouts import Layout, is_part, pick_members, split_dotted
from longtake.data.decode import DecodeError
from longtake.data.decode import probe as read_header
from longtake.data.decode.check import decode_all
from longtake.data.samples import (
    LATENT_EXTENSION,
    MAX_NUMBER,
    SampleError,
    SampleMeta,
    combine_meta,
)
from longtake.data.shards import ShardReader, Span, scan_members

SCHEMA_VERSION = 2
MAX_PAYLOAD_BYTES = 2**31  # a clip is read whole
MAX_META_BYTES = 2**22
PROBES = ("header", "full")

_TEXT = pa.struct(
    [("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("xxh3", pa.string())]
)

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
        ("texts", pa.list_(_TEXT)),  # captions in members beside the meta member; null for none
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
        ("variant", pa.int32()),  # of latents: which cut of its clip; 0 is the central one
    ]
)


@dataclass
class ShardIndex:
    """What one shard holds: rows for SCHEMA, samples that cannot be used with their reasons, and
    how many members of which kind belong to no sample."""

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, str]] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

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


def index_shard(path: Path, dataset: str, *, name: str = "", probe: str = "header") -> ShardIndex:
    """Scan one shard and probe its headers, or with `probe` full decode every frame of it.

    `name` is the shard's where `path` is a copy of it.

    Raises:
        ShardError: the tar itself is damaged, empty or unsafe.
    """
    index = ShardIndex(name or path.name)
    scanned = scan_members(path)
    index.passed_over = scanned.passed_over
    reader = ShardReader()
    try:
        for entry in scanned.samples:
            for ext in entry.members:
                if not is_part(ext):
                    index.passed_over[f".{ext.rpartition('.')[2].lower()}"] += 1
            for key, members in split_dotted(entry.key, entry.members):
                try:
                    layout = pick_members(members)
                    index.passed_over.update(f".{ext}" for ext in layout.unknown)
                    row = _row(key, members, layout, path, dataset, reader, probe)
                    index.rows.append({**row, "shard": index.name})
                except (SampleError, DecodeError) as error:
                    index.rejected.append({"key": key, "shard": index.name, "reason": str(error)})
    finally:
        reader.close()
    return index


def _row(
    key: str,
    members: dict[str, Span],
    layout: Layout,
    path: Path,
    dataset: str,
    reader: ShardReader,
    probe: str,
) -> dict[str, Any]:
    ext, span = layout.payload.rpartition(".")[2].lower(), members[layout.payload]
    if span.size > MAX_PAYLOAD_BYTES:
        raise SampleError(f"{ext} of {span.size} bytes is over the limit of {MAX_PAYLOAD_BYTES}")
    texts, contents = [], []
    for spelled, meaning in layout.metas:
        place = members[spelled]
        if place.size > MAX_META_BYTES:
            raise SampleError(
                f"{spelled} of {place.size} bytes is over the limit of {MAX_META_BYTES}"
            )
        data = reader.read(path, place)
        contents.append((meaning, data))
        texts.append({"ext": meaning, **place._asdict(), "xxh3": content_hash(data)})
    meta, first = combine_meta(contents), texts.pop(0)
    payload = reader.read(path, span)
    if ext == LATENT_EXTENSION:
        facts = _latent_facts(payload, meta)
    else:
        facts = _video_facts(payload, decodes=probe == "full")
    return {
        "sample_id": name_hash(dataset, key),
        "source_id": name_hash(dataset, meta.text("source_id") or key),
        "key": key,
        "ext": ext,
        "payload_offset": span.offset,
        "payload_size": span.size,
        "meta_ext": first["ext"],
        "meta_offset": first["offset"],
        "meta_size": first["size"],
        "xxh3": content_hash(payload),
        "meta_xxh3": first["xxh3"],
        "texts": texts or None,
        "caption_chars": [(kind, len(caption)) for kind, caption in meta.captions.items()],
        "licence": meta.text("licence"),
        "split": meta.text("split"),
        "family": meta.text("family"),
        "scores": [(name, score) for name, score in meta.scores().items()],
        **facts,
    }


def _video_facts(payload: bytes, decodes: bool) -> dict[str, Any]:
    info = read_header(payload)
    if decodes:
        info = replace(info, **vars(decode_all(payload)))
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
        **_variant(meta.fields.get("variant")),
    }


def _variant(cut: Any) -> dict[str, int]:
    """The column `variant`, where the json tells one."""
    index = cut.get("index") if isinstance(cut, dict) else None
    return {"variant": index} if type(index) is int and 0 <= index <= MAX_NUMBER else {}
