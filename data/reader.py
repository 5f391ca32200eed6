"""One planned sample: bytes, checked against the catalogue, to a clip."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from longtake.data.catalogue import Catalogue, column
from longtake.data.decode import DecodeError, decode_clip
from longtake.data.indexing import content_hash
from longtake.data.latents import decode_sample, normalise, read_manifest
from longtake.data.plan_config import DataConfig
from longtake.data.planned import PlannedSample
from longtake.data.samples import LATENT_EXTENSION, SampleError, parse_meta
from longtake.data.shards import ShardError, ShardReader, Span
from longtake.data.transforms import covering_size, crop_clip


class BadSample(ValueError):
    """A sample that cannot be used although it is in the catalogue; the message is the reason."""


@dataclass
class Clip:
    """A sample ready for the model: `video` uint8 (3, T, H, W) or normalised `latents` float32
    (C, T, H, W); `text` token ids (L,) int64 or embeddings (L, D) where they are cached."""

    sample: PlannedSample
    caption: str
    fps: float
    video: Tensor | None = None
    latents: Tensor | None = None
    text: Tensor | None = None
    truth: dict[str, Any] | None = None


class SampleReader:
    """Reads planned samples of some catalogues. One for each process."""

    def __init__(self, catalogues: Sequence[Catalogue], config: DataConfig) -> None:
        self._decoder = config.decoder
        self._shards = ShardReader()
        self._sources = [_Source(catalogue) for catalogue in catalogues]

    def read(self, sample: PlannedSample) -> Clip:
        """Read, check and decode.

        Raises:
            BadSample: content other than indexed, a caption or payload that cannot be read.
        """
        source = self._sources[sample.dataset]
        try:
            meta_bytes = self._member(source, sample.row, "meta")
            payload = self._member(source, sample.row, "payload")
            meta = parse_meta(source.text("meta_ext", sample.row), meta_bytes)
            caption = meta.captions.get(sample.caption_kind)
            if caption is None:
                raise SampleError(f"caption of kind {sample.caption_kind!r} missing")
            clip = Clip(sample, caption, sample.fps, truth=meta.fields.get("truth"))
            if source.text("ext", sample.row) == LATENT_EXTENSION:
                self._fill_latents(clip, source, payload)
            else:
                self._fill_video(clip, source, payload)
        except (SampleError, DecodeError, ShardError) as error:
            raise BadSample(str(error)) from error
        return clip

    def _member(self, source: "_Source", row: int, name: str) -> bytes:
        offset, size = source.numbers[f"{name}_offset"][row], source.numbers[f"{name}_size"][row]
        path = source.root / source.text("shard", row)
        data = self._shards.read(path, Span(int(offset), int(size)))
        if content_hash(data) != source.text("xxh3" if name == "payload" else "meta_xxh3", row):
            raise SampleError(f"{name} changed after indexing (xxh3 differs)")
        return data

    def _fill_video(self, clip: Clip, source: "_Source", payload: bytes) -> None:
        _, height, width = clip.sample.shape
        row = clip.sample.row
        frame = int(source.numbers["height"][row]), int(source.numbers["width"][row])
        size = covering_size(*frame, height, width)
        frames = decode_clip(payload, clip.sample.times, decoder=self._decoder, size=size)
        clip.video = crop_clip(frames, height, width, clip.sample.crop)

    def _fill_latents(self, clip: Clip, source: "_Source", payload: bytes) -> None:
        stored = decode_sample(payload)
        clip.latents = normalise(stored.latents, source.manifest)
        clip.text = stored.text.get(clip.sample.caption_kind)
        if clip.text is None:
            raise SampleError(
                f"text of caption kind {clip.sample.caption_kind!r} is not cached; "
                "run `longtake encode` with that kind"
            )
        if source.manifest.text.kind == "tokens":
            clip.text = clip.text.long()


class _Source:
    """Columns of a catalogue that reading needs."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.root: Path = catalogue.root
        self._table = catalogue.table
        names = ("payload_offset", "payload_size", "meta_offset", "meta_size", "height", "width")
        self.numbers: dict[str, np.ndarray] = {n: column(catalogue.table, n) for n in names}
        if catalogue.table.column("lt").null_count < len(catalogue):
            self.manifest = read_manifest(catalogue.root)

    def text(self, name: str, row: int) -> str:
        return self._table.column(name)[row].as_py()
