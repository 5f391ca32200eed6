"""`longtake encode`: pixel shards → latent shards with text, one by one, so a killed run goes on.

Everything is gathered in OUT.partial and renamed to OUT at the end; OUT is whole or absent.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from longtake.data.catalogue import Catalogue, build_catalogue, load_catalogue
from longtake.data.config import BucketConfig, DataConfig, DatasetConfig
from longtake.data.latents import LatentWriter, TextCache, read_manifest
from longtake.data.plan.planned import PlannedSample
from longtake.data.plan.tables import SampleTable
from longtake.data.plan.val_plan import ValPlan
from longtake.data.reader import BadSample, SampleReader
from longtake.data.transforms import to_float
from longtake.models.text import TextConfig, TextEncoder, Tokenizer
from longtake.models.vae import vae_hash
from longtake.train.codec import text_hash
from longtake.train.latent_stats import LatentStats, latent_stats, stats_of_latents
from longtake.train.runs import LoadedVAE, load_vae, pick_device

PASSED_ON = ("licence", "source", "source_id", "split", "family", "truth", "scores")
JOB, SKIPPED, MANIFEST = "job.json", "skipped.jsonl", "latents.json"


@dataclass(frozen=True)
class EncodeOptions:
    """How to cut and encode. None stands for the VAE run's own value."""

    text: TextConfig
    catalogue: Path | None = None
    where: str = ""
    frames: int | None = None
    size: tuple[int, int] | None = None  # (height, width)
    fps: float | None = None
    caption_kinds: tuple[str, ...] | None = None  # None: all that the catalogue has
    stats_from: Path | None = None  # latents whose mean and std to take over
    weights: str = "ema"
    batch_size: int = 16
    device: str = "auto"


@dataclass(frozen=True)
class EncodeReport:
    """What a call did: samples in OUT, and samples that could not be read."""

    out: Path
    num_samples: int
    num_skipped: int
    num_shards: int
    reused_shards: int

    def __str__(self) -> str:
        text = f"{self.out}: {self.num_samples} samples in {self.num_shards} shards"
        if self.reused_shards:
            text += f", {self.reused_shards} of them from before"
        return text + (f"; {self.num_skipped} skipped, see {SKIPPED}" if self.num_skipped else "")


@dataclass(frozen=True)
class EncodedText:
    """Token ids or embeddings of captions; a frozen encoder runs once, here."""

    tokenizer: Tokenizer
    encoder: TextEncoder | None  # None: the ids are what is cached

    @property
    def cache(self) -> TextCache:
        config = self.tokenizer.config
        kind = "tokens" if self.encoder is None else "embeddings"
        return TextCache(kind, text_hash(config), config.max_length)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """(L,) ids or (L, D) embeddings of each caption, without padding."""
        ids = self.tokenizer(captions)
        if self.encoder is None:
            return ids
        embeds, lens = self.encoder(ids)
        return [row[:length].cpu() for row, length in zip(embeds, lens.tolist(), strict=True)]


def encode_shards(vae: Path, shards: Path, out: Path, options: EncodeOptions) -> EncodeReport:
    """Encode every sample that fits a bucket of the VAE; the same call goes on after a kill.

    ValueError when OUT exists and holds something else, nothing fits, or statistics are missing.
    """
    device = pick_device(options.device)
    loaded = load_vae(vae, options.weights, device)
    digest = vae_hash(loaded.vae.state_dict(), loaded.vae.config)
    catalogue = load_catalogue(shards, options.catalogue)
    config = data_config(loaded, catalogue, shards, options)
    plan = ValPlan.from_catalogues([catalogue], config, loaded.config.seed, len(catalogue))
    table = plan.tables[0]
    job = describe_job(digest, table, config, options)
    if out.exists() and any(out.iterdir()):
        return already_done(out, job)
    if options.stats_from is not None:
        stats = stats_of_latents(options.stats_from, digest)
    else:
        stats = latent_stats(loaded, digest)
    text = EncodedText(Tokenizer(options.text), None)
    if options.text.kind == "pretrained":
        text = replace(text, encoder=TextEncoder(options.text).to(device).eval())
    staging = prepare_staging(out, job)
    by_shard = group_by_shard(plan)
    reused = 0
    with Progress() as progress:
        for line in table.drops():
            progress.console.print(line, markup=False)
        bar = progress.add_task("encode", total=sum(map(len, by_shard.values())))
        for name, samples in by_shard.items():
            if (staging / name).is_file():
                reused += 1
            else:
                encoder = ShardEncoder(loaded, table, config, text, stats, options.batch_size)
                encoder.write(staging, name, samples)
            progress.advance(bar, len(samples))
    return finish(staging, out, vae, catalogue.dataset, reused)


def data_config(
    loaded: LoadedVAE, catalogue: Catalogue, shards: Path, options: EncodeOptions
) -> DataConfig:
    """The shapes and caption kinds to encode, as a validation set: in order, cut at the centre."""
    data = loaded.config.data
    buckets = data.buckets
    if options.frames or options.size:
        first = buckets[0]
        height, width = options.size or (first.height, first.width)
        buckets = [BucketConfig(options.frames or first.frames, height, width, 1)]
    for bucket in buckets:
        loaded.vae.config.latent_shape(bucket.frames, bucket.height, bucket.width)
    kinds = options.caption_kinds or caption_kinds(catalogue)
    dataset = DatasetConfig(
        str(shards),
        None if options.catalogue is None else str(options.catalogue),
        where=options.where,
        captions=dict.fromkeys(kinds, 1.0),
    )
    return DataConfig(
        val=[dataset],
        buckets=[replace(bucket, batch_size=options.batch_size) for bucket in buckets],
        fps=options.fps or data.fps,
        decoder=data.decoder,
        resize=data.resize,
        decode_timeout=data.decode_timeout,
        decode_memory=data.decode_memory,
        cache=data.cache,
    )


def caption_kinds(catalogue: Catalogue) -> tuple[str, ...]:
    """Every kind of caption in the catalogue, sorted."""
    column = catalogue.table.column("caption_chars").to_pylist()
    return tuple(sorted({kind for row in column for kind, _ in row}))


def describe_job(
    digest: str, table: SampleTable, config: DataConfig, options: EncodeOptions
) -> dict[str, Any]:
    """All that the encoded bytes depend on; a half-done folder of another job is not continued."""
    return {
        "vae_hash": digest,
        "source": table.info.fingerprint,
        "buckets": [bucket.name for bucket in config.buckets],
        "captions": sorted(config.val[0].captions),
        "fps": config.fps,
        "resize": config.resize,
        "text": asdict(options.text),
        "stats_from": None if options.stats_from is None else str(options.stats_from.resolve()),
    }


def already_done(out: Path, job: dict[str, Any]) -> EncodeReport:
    """The report of an earlier call with the same job; ValueError for any other content."""
    if not (out / JOB).is_file() or json.loads((out / JOB).read_text()) != job:
        raise ValueError(
            f"{out}: exists and holds something else than this encode would write; "
            "remove it or choose another folder"
        )
    num_shards = len(list(out.glob("*.tar")))
    num_samples = read_manifest(out).num_samples
    return EncodeReport(out, num_samples, _count_lines(out / SKIPPED), num_shards, num_shards)


def prepare_staging(out: Path, job: dict[str, Any]) -> Path:
    """OUT.partial, kept when an earlier call with the same job left it."""
    staging = out.with_name(f"{out.name}.partial")
    record = staging / JOB
    if staging.exists() and not (record.is_file() and json.loads(record.read_text()) == job):
        shutil.rmtree(staging)
    staging.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
    return staging


def group_by_shard(plan: ValPlan) -> dict[str, list[PlannedSample]]:
    """Samples of each source shard, in order, bucket by bucket."""
    table = plan.tables[0]
    groups: dict[str, list[PlannedSample]] = defaultdict(list)
    for batch in plan.micro_batches(0, 1):
        for sample in batch.samples:
            groups[table.shard(sample.row)[0]].append(sample)
    return dict(sorted(groups.items()))


class ShardEncoder:
    """Encodes the samples of one source shard into one latent shard."""

    def __init__(
        self,
        loaded: LoadedVAE,
        table: SampleTable,
        config: DataConfig,
        text: EncodedText,
        stats: LatentStats,
        batch_size: int,
    ) -> None:
        self.loaded, self.table, self.text, self.stats = loaded, table, text, stats
        self.kinds = list(config.val[0].captions)
        self.batch_size = batch_size
        self.samples = SampleReader([table], config)
        self.device = next(loaded.vae.parameters()).device
        self.skipped: list[dict[str, str]] = []

    def write(self, staging: Path, name: str, samples: Sequence[PlannedSample]) -> None:
        """Write staging/name; it appears whole, the list of skipped samples just before it."""
        scratch = staging / f"{name}.partial"
        shutil.rmtree(scratch, ignore_errors=True)
        batches = self._batches(samples)
        first = next(batches, None)
        self._list_skipped(staging, name)
        if first is None:  # a tar without samples is no shard
            return
        vae = self.loaded.vae
        empty = self.text([""])[0] if self.text.encoder is not None else None
        with LatentWriter(
            scratch,
            vae_hash=self.stats.vae_hash,
            z_dim=vae.config.z_dim,
            strides=vae.strides,
            text=self.text.cache,
            empty_text=empty,
            mean=self.stats.mean,
            std=self.stats.std,
            dataset=self.table.info.dataset,
            max_samples=len(samples) + 1,
            max_bytes=2**62,  # one source shard, one tar
        ) as writer:
            for batch, videos in chain([first], batches):
                for sample, latents in zip(batch, self._encode(videos), strict=True):
                    meta = self._meta(sample)
                    kinds = [kind for kind in self.kinds if kind in meta["captions"]]
                    rows = self.text([meta["captions"][kind] for kind in kinds])
                    writer.write(sample.key, latents, dict(zip(kinds, rows, strict=True)), meta)
        self._list_skipped(staging, name)
        for extra in (MANIFEST, "empty_text.safetensors"):
            if (scratch / extra).is_file():
                os.replace(scratch / extra, staging / extra)
        (made,) = scratch.glob("*.tar")
        os.replace(made, staging / name)
        shutil.rmtree(scratch)

    def _list_skipped(self, staging: Path, name: str) -> None:
        if self.skipped:
            lines = [json.dumps(entry) + "\n" for entry in self.skipped]
            (staging / f"{name}.{SKIPPED}").write_text("".join(lines), encoding="utf-8")

    def _batches(
        self, samples: Sequence[PlannedSample]
    ) -> Iterator[tuple[list[PlannedSample], list[Tensor]]]:
        """Readable samples with their pixels, in batches of one shape."""
        batch: list[PlannedSample] = []
        videos: list[Tensor] = []
        for sample in samples:
            try:
                video = self.samples.read(sample).video
            except BadSample as error:
                self.skipped.append({"key": sample.key, "reason": str(error)})
                continue
            if video is None:
                raise ValueError(f"{self.table.root}: holds latents already, not pixels")
            if batch and (len(batch) == self.batch_size or videos[0].shape != video.shape):
                yield batch, videos
                batch, videos = [], []
            batch.append(sample)
            videos.append(video)
        if batch:
            yield batch, videos

    @torch.no_grad()
    def _encode(self, videos: Sequence[Tensor]) -> Tensor:
        """uint8 (3, T, H, W) each → raw posterior means (B, C, T', H', W')."""
        bf16 = self.loaded.config.engine.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return self.loaded.vae.encode(to_float(torch.stack(list(videos))).to(self.device)).mean

    def _meta(self, sample: PlannedSample) -> dict[str, Any]:
        """key.json of the latents: what the clip's own said, and how it was cut."""
        meta = self.samples.meta(sample)
        frames, height, width = sample.shape
        return {
            "captions": meta.captions,
            "frames": frames,
            "height": height,
            "width": width,
            "fps": sample.fps,
            "source_id": sample.key,
            **{name: meta.fields[name] for name in PASSED_ON if name in meta.fields},
            "variant": {"times": sample.times, "crop": sample.crop, "fps": sample.fps},
        }


def finish(staging: Path, out: Path, vae: Path, dataset: str, reused: int) -> EncodeReport:
    """Catalogue and manifest over all shards, then the rename that makes OUT exist."""
    if not any(staging.glob("*.tar")):
        raise ValueError(f"{staging}: not one sample could be read, see its *.{SKIPPED}")
    skipped = sorted(staging.glob(f"*.{SKIPPED}"))
    if skipped:
        (staging / SKIPPED).write_text("".join(path.read_text() for path in skipped))
        for path in skipped:
            path.unlink()
    catalogue = build_catalogue(staging, dataset=dataset, progress=False)
    manifest = json.loads((staging / MANIFEST).read_text())
    manifest["num_samples"] = len(catalogue)
    manifest["versions"]["vae_run"] = os.path.relpath(vae.resolve(), out.resolve())
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    if out.exists():
        out.rmdir()  # empty: anything else was refused
    os.replace(staging, out)
    num_skipped = _count_lines(out / SKIPPED)
    num_shards = len(list(out.glob("*.tar")))
    return EncodeReport(out, len(catalogue), num_skipped, num_shards, reused)


def _count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0
