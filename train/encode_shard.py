"""One source shard into one shard of latents, with text and segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.data.latents import LatentManifest, LatentSample, LatentWriter
from longtake.data.reader import BadSample, SampleReader
from longtake.data.samples import SampleError
from longtake.data.segments import Segment
from longtake.data.transforms import to_float
from longtake.models.text import TextConfig, TextEncoder, Tokenizer
from longtake.models.vae_bounded import encode_bounded
from longtake.train.encode_claims import ShardRecord
from longtake.train.encode_forecast import EncodeProgress
from longtake.train.encode_plan import Cut, EncodePlan, latent_meta
from longtake.train.runs import LoadedVAE

_BATCH_BYTES = 2**30  # of uint8 pixels in a batch: long clips come one by one


@dataclass(frozen=True)
class EncodedText:
    """Token ids or embeddings of captions; a frozen encoder runs once, here."""

    tokenizer: Tokenizer
    encoder: TextEncoder | None  # None: the ids are what is cached

    @classmethod
    def load(cls, config: TextConfig, device: torch.device) -> EncodedText:
        """Tokenizer and, where it is not trained with the DiT, encoder of a config."""
        text = cls(Tokenizer(config), None)
        if not config.is_trained:
            text = replace(text, encoder=TextEncoder(config).to(device).eval())
        return text

    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """(L,) ids or (L, D) embeddings of each caption, without padding."""
        ids = self.tokenizer(captions)
        return ids if self.encoder is None else self.encoder.rows(ids)


class ShardEncoder:
    """Encodes source shards, one after the other."""

    def __init__(
        self, loaded: LoadedVAE, plan: EncodePlan, manifest: LatentManifest, text: EncodedText
    ) -> None:
        self.loaded, self.plan, self.manifest, self.text = loaded, plan, manifest, text
        self.kinds = list(plan.config.val[0].captions)
        self.batch_size = plan.config.buckets[0].batch_size or 1  # all are alike
        self.samples = SampleReader([plan.table], plan.config)
        self.device = next(loaded.vae.parameters()).device

    def write(self, path: Path, cuts: Sequence[Cut], progress: EncodeProgress) -> ShardRecord:
        """Write the cuts of one shard; samples that cannot be read or encoded are left out."""
        skipped: list[dict[str, str]] = []
        with LatentWriter(path, self.manifest) as writer:
            for batch, metas, videos in self._batches(cuts, skipped):
                samples = self._encode(videos, self._texts(metas))
                for cut, sample, meta in zip(batch, samples, metas, strict=True):
                    try:
                        writer.write(cut.key, sample, meta)
                    except SampleError as error:
                        skipped.append({"key": cut.key, "reason": str(error)})
                progress.advance(len(batch))
        size = path.stat().st_size if writer.num_samples else 0
        return ShardRecord(writer.num_samples, size, skipped)

    def _batches(
        self, cuts: Sequence[Cut], skipped: list[dict[str, str]]
    ) -> Iterator[tuple[list[Cut], list[dict[str, Any]], Tensor]]:
        """Readable cuts, their key.json and pixels uint8 (B, 3, T, H, W), in batches of a shape."""
        batch: list[Cut] = []
        metas: list[dict[str, Any]] = []
        videos: list[Tensor] = []
        for cut in cuts:
            try:
                video, meta = self.samples.read(cut.sample).video, latent_meta(self.samples, cut)
            except BadSample as error:
                skipped.append({"key": cut.key, "reason": str(error)})
                continue
            if video is None:
                raise ValueError(f"{self.plan.table.root}: holds latents already, not pixels")
            limit = min(self.batch_size, max(1, _BATCH_BYTES // video.numel()))
            if batch and (len(batch) == limit or videos[0].shape != video.shape):
                yield batch, metas, torch.stack(videos)
                batch, metas, videos = [], [], []
            batch.append(cut)
            metas.append(meta)
            videos.append(video)
        if batch:
            yield batch, metas, torch.stack(videos)

    def _texts(self, metas: Sequence[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Ids or embeddings of the wanted captions of each sample, by kind."""
        named = [
            (index, kind, meta["captions"][kind])
            for index, meta in enumerate(metas)
            for kind in self.kinds
            if kind in meta["captions"]
        ]
        texts: list[dict[str, Tensor]] = [{} for _ in metas]
        rows = self.text([caption for _, _, caption in named])
        for (index, kind, _), row in zip(named, rows, strict=True):
            texts[index][kind] = row
        return texts

    @torch.no_grad()
    def _encode(self, videos: Tensor, texts: Sequence[dict[str, Tensor]]) -> list[LatentSample]:
        """uint8 (B, 3, T, H, W) → raw posteriors and segments, with the text of each."""
        bf16 = self.loaded.config.engine.precision == "bf16"
        vae, frames = self.loaded.vae, videos.shape[2]
        pixels = to_float(videos.to(self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            whole = encode_bounded(vae, pixels)
            segments = {
                spec.name: Segment(
                    spec.encode(lambda piece: encode_bounded(vae, piece).mean, pixels),
                    spec.places(frames, vae.strides[0]),
                )
                for spec in self.plan.segments_of(frames)
            }
        return [
            LatentSample(
                whole.mean[index],
                text,
                whole.logvar[index] if self.manifest.logvar else None,
                {n: replace(s, latents=s.latents[index]) for n, s in segments.items()},
            )
            for index, text in enumerate(texts)
        ]
