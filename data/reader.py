"""One planned sample: bytes, checked against the catalogue, to a clip."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import xxhash
from torch import Tensor

from longtake.data.config import DataConfig
from longtake.data.decode import DecodeError, decode_clip
from longtake.data.decode.guard import DecodeGuard
from longtake.data.latents import (
    LatentManifest,
    decode_sample,
    normalise,
    read_manifest,
    refuse_foreign_sample,
)
from longtake.data.plan.planned import PlannedSample
from longtake.data.plan.tables import Record, SampleTable
from longtake.data.samples import LATENT_EXTENSION, SampleError, SampleMeta, combine_meta
from longtake.data.segments import Segment
from longtake.data.shards import ShardError, Span
from longtake.data.shards.storage import Shards, join
from longtake.data.transforms import covering_size, crop_clip


class BadSample(ValueError):
    """A sample that cannot be used although it is in the catalogue; the message is the reason."""


@dataclass
class Clip:
    """A sample ready for the model: `video` uint8 (3, T, H, W) or normalised `latents` float32
    (C, T, H, W); `text` token ids (L,) int64 or embeddings (L, D) where they are cached, and the
    normalised `segments` of cached latents by name."""

    sample: PlannedSample
    caption: str
    fps: float
    video: Tensor | None = None
    latents: Tensor | None = None
    text: Tensor | None = None
    scores: dict[str, float] = field(default_factory=dict)
    truth: dict[str, Any] | None = None
    segments: dict[str, Segment] = field(default_factory=dict)

    def segment(self, name: str) -> Segment:
        """A piece that was encoded alone.

        Raises:
            ValueError: it is not stored.
        """
        if name not in self.segments:
            everything = ",".join((*self.segments, name))
            raise ValueError(
                f"{self.sample.key}: holds no segment {name!r}, which its task needs; run "
                f"`longtake encode … --segments {everything}`"
            )
        return self.segments[name]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; segments as "segment.<name>"."""
        named = {"video": self.video, "latents": self.latents, "text": self.text}
        named |= {f"segment.{name}": segment.latents for name, segment in self.segments.items()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Clip":
        """The clip with other tensors under some of the names of `tensors`."""
        segments = {
            name: replace(segment, latents=tensors.get(f"segment.{name}", segment.latents))
            for name, segment in self.segments.items()
        }
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("segment.")}
        return replace(self, segments=segments, **own)


class SampleReader:
    """Reads planned samples of some tables. One for each process."""

    def __init__(self, tables: Sequence[SampleTable], config: DataConfig) -> None:
        self._config = config
        self._sources = [_Source(table, config) for table in tables]
        self._decode = decode_clip
        if config.decode_timeout is not None:
            self._decode = DecodeGuard(config.decode_timeout, config.decode_memory).decode_clip

    def read(self, sample: PlannedSample) -> Clip:
        """Read, check and decode.

        Raises:
            BadSample: content other than indexed, a caption or payload that cannot be read.
            StorageError: the shards cannot be reached, which is no fault of the sample.
            ValueError: latents of another VAE than the folder's, which is none either.
        """
        source = self._sources[sample.dataset]
        try:
            payload, meta = source.members(sample.row)
            caption = meta.captions.get(sample.caption_kind)
            if caption is None:
                raise SampleError(f"caption of kind {sample.caption_kind!r} missing")
            clip = Clip(sample, caption, sample.fps, scores=meta.scores())
            clip.truth = meta.fields.get("truth")
            if source.ext(sample.row) == LATENT_EXTENSION:
                refuse_foreign_sample(
                    source.manifest,
                    meta.fields,
                    lambda: f"{source.shard(sample.row)}: {sample.key}",
                )
                self._fill_latents(clip, source, payload)
            else:
                self._fill_video(clip, source, payload)
        except (SampleError, DecodeError, ShardError) as error:
            raise BadSample(str(error)) from error
        return clip

    def meta(self, sample: PlannedSample) -> SampleMeta:
        """All captions of a sample and the fields of its json; errors as of `read`."""
        try:
            return self._sources[sample.dataset].members(sample.row)[1]
        except (SampleError, ShardError) as error:
            raise BadSample(str(error)) from error

    def prefetch(self, samples: Iterable[PlannedSample]) -> None:
        """Start fetching remote samples that will be read soon."""
        for index, source in enumerate(self._sources):
            source.prefetch(sample.row for sample in samples if sample.dataset == index)

    def _fill_video(self, clip: Clip, source: "_Source", payload: bytes) -> None:
        _, height, width = clip.sample.shape
        record = source.table.record(clip.sample.row)
        frames = self._decode(
            payload,
            clip.sample.times,
            decoder=self._config.decoder,
            size=covering_size(record.height, record.width, height, width),
            resize=self._config.resize,
            frame_size=(record.height, record.width),
        )
        if clip.sample.flip:
            frames = frames[:, :, ::-1]
        clip.video = crop_clip(frames, height, width, clip.sample.crop)

    def _fill_latents(self, clip: Clip, source: "_Source", payload: bytes) -> None:
        stored = decode_sample(payload)
        expected = source.manifest.latent_shape(clip.sample.shape)
        if tuple(stored.latents.shape) != expected:
            raise SampleError(
                f"latents of shape {tuple(stored.latents.shape)}, a clip of {clip.sample.shape} "
                f"has {expected}: run `longtake encode` again"
            )
        clip.latents = normalise(stored.latents, source.manifest)
        for name, segment in stored.segments.items():
            clip.segments[name] = replace(
                segment, latents=normalise(segment.latents, source.manifest)
            )
        clip.text = stored.text.get(clip.sample.caption_kind)
        if clip.text is None:
            raise SampleError(
                f"text of caption kind {clip.sample.caption_kind!r} is not cached; "
                "run `longtake encode` with that kind"
            )
        if source.manifest.text.kind == "tokens":
            clip.text = clip.text.long()


class _Source:
    """The members of a table's samples."""

    def __init__(self, table: SampleTable, config: DataConfig) -> None:
        self.table = table
        self._shards = Shards(table.root, config.cache)

    @cached_property
    def manifest(self) -> LatentManifest:
        return read_manifest(self.table.root)

    def ext(self, row: int) -> str:
        return self.table.info.extensions[self.table.rows["ext"][row]]

    def shard(self, row: int) -> str:
        """The tar of a sample: its path or URL."""
        return join(self.table.root, self.table.info.shards[self.table.record(row).shard][0])

    def members(self, row: int) -> tuple[bytes, SampleMeta]:
        """Payload and captions, as they were when they were indexed."""
        record = self.table.record(row)
        shard, size = self.table.info.shards[record.shard]
        members = self._members(record)
        spans = [member.span for member in members]
        found = self._shards.read(shard, spans, shard_bytes=size)
        changed = _changed(members, found)
        if changed and self._shards.forget(shard, spans):  # the copy on this node may be at fault
            found = self._shards.read(shard, spans, shard_bytes=size)
            changed = _changed(members, found)
        if changed:
            raise SampleError(f"{changed} changed after indexing (xxh3 differs)")
        texts = [(member.name, data) for member, data in zip(members[1:], found[1:], strict=True)]
        return found[0], combine_meta(texts, is_known=True)

    def prefetch(self, rows: Iterable[int]) -> None:
        records = (self.table.record(row) for row in rows)
        shards = self.table.info.shards
        self._shards.prefetch(
            [(shards[r.shard][0], [m.span for m in self._members(r)]) for r in records]
        )

    def _members(self, record: Record) -> list["_Member"]:
        """The payload, then the captions."""
        found = [
            _Member("payload", Span(record.payload_offset, record.payload_size), record.xxh3),
            _Member(
                self.table.info.extensions[record.meta_ext],
                Span(record.meta_offset, record.meta_size),
                record.meta_xxh3,
            ),
        ]
        for text in self.table.texts(record):
            span = Span(text["offset"], text["size"])
            found.append(_Member(text["ext"], span, bytes.fromhex(text["xxh3"])))
        return found


class _Member(NamedTuple):
    """What to read of a sample: "payload" or the extension of a caption, its place and xxh3."""

    name: str
    span: Span
    digest: bytes


def _changed(members: list[_Member], found: list[bytes]) -> str:
    """The first member whose bytes are not those that were indexed, or ""."""
    for member, data in zip(members, found, strict=True):
        if xxhash.xxh3_128_digest(data) != member.digest:
            return member.name
    return ""
