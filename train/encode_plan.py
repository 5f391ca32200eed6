"""What an encode will write: which cuts of which samples, and all that their bytes depend on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from longtake.data.catalogue import Catalogue, load_catalogue
from longtake.data.config import BucketConfig, DataConfig, DatasetConfig
from longtake.data.latents import TextCache
from longtake.data.plan.draws import Draws
from longtake.data.plan.lanes import Place
from longtake.data.plan.planned import PlannedSample
from longtake.data.plan.tables import SampleTable
from longtake.data.plan.val_plan import ValPlan
from longtake.data.randomness import derive_seed
from longtake.data.reader import SampleReader
from longtake.data.segments import SegmentSpec
from longtake.data.transforms import corner, covering_size
from longtake.models.text import TextConfig
from longtake.models.vae import vae_hash
from longtake.train.runs import LoadedVAE
from longtake.train.text_identity import text_hash

PASSED_ON = ("licence", "source", "source_id", "split", "family", "truth", "scores")


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
    variants: int = 1  # cuts of every sample; the first one is central
    segments: tuple[str, ...] = ()  # pieces encoded alone, see data.segments
    logvar: bool = False
    stats_from: Path | None = None  # latents whose mean and std to take over
    weights: str = "ema"
    batch_size: int = 16
    device: str = "auto"


@dataclass(frozen=True)
class Cut:
    """One cut of a clip. Variant 0 is the central one, and keeps the clip's key."""

    sample: PlannedSample
    variant: int

    @property
    def key(self) -> str:
        return f"{self.sample.key}~{self.variant}" if self.variant else self.sample.key


@dataclass(frozen=True)
class EncodePlan:
    """The cuts of each source shard, in order, and what describes the whole job."""

    table: SampleTable
    config: DataConfig
    shards: dict[str, list[Cut]]
    segments: tuple[SegmentSpec, ...]
    vae_hash: str
    job: dict[str, Any]  # a half-done folder of another job is not continued

    @property
    def cuts(self) -> list[Cut]:
        return [cut for cuts in self.shards.values() for cut in cuts]

    def segments_of(self, frames: int) -> tuple[SegmentSpec, ...]:
        """The pieces that clips of so many frames have: an image has at most `shown:0`."""
        return tuple(segment for segment in self.segments if segment.fits(frames))


def plan_encode(loaded: LoadedVAE, shards: Path, options: EncodeOptions) -> EncodePlan:
    """ValueError where nothing fits a bucket, or the clips have no such segments."""
    digest = vae_hash(loaded.vae.state_dict(), loaded.vae.config)
    catalogue = load_catalogue(shards, options.catalogue)
    config = data_config(loaded, catalogue, shards, options)
    segments = tuple(SegmentSpec.parse(name) for name in options.segments)
    for segment in segments:
        segment.check(max(bucket.frames for bucket in config.buckets), loaded.vae.strides[0])
    val = ValPlan.from_catalogues([catalogue], config, loaded.config.seed, len(catalogue))
    table = val.tables[0]
    groups: dict[str, list[Cut]] = {}
    for cut in draw_cuts(val, options.variants):
        groups.setdefault(table.shard(cut.sample.row)[0], []).append(cut)
    job = {
        "vae_hash": digest,
        "source": table.info.fingerprint,
        "seed": loaded.config.seed,
        "buckets": [bucket.name for bucket in config.buckets],
        "lengths": [asdict(length) for length in config.lengths],
        "captions": sorted(config.val[0].captions),
        "fps": config.fps,
        "resize": config.resize,
        "variants": options.variants,
        "segments": list(options.segments),
        "logvar": options.logvar,
        "text": asdict(text_cache(options.text)),
        "stats_from": None if options.stats_from is None else str(options.stats_from.resolve()),
    }
    return EncodePlan(table, config, dict(sorted(groups.items())), segments, digest, job)


def data_config(
    loaded: LoadedVAE, catalogue: Catalogue, shards: Path, options: EncodeOptions
) -> DataConfig:
    """The shapes and caption kinds to encode, as a validation set in order. Windows and crops are
    drawn for variants; clips are never mirrored, whose captions may say left or right."""
    data = loaded.config.data
    buckets, lengths = data.buckets, data.lengths
    if options.frames or options.size:
        first = buckets[0]
        height, width = options.size or (first.height, first.width)
        buckets, lengths = [BucketConfig(options.frames or first.frames, height, width, 1)], []
    for bucket in buckets:
        loaded.vae.config.latent_shape(*bucket.shape)
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
        lengths=lengths,
        fps=options.fps or data.fps,
        crop="random",
        window="random",
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


def draw_cuts(val: ValPlan, variants: int) -> Iterator[Cut]:
    """The central cut of every sample, bucket by bucket, each followed by those drawn from (seed,
    sample_id, variant). A draw that cuts what an earlier one cut already is left out."""
    table, draws = val.tables[0], Draws(val.tables, val.config.val, val.config)
    for batch in val.micro_batches(0, 1):
        for central in batch.samples:
            record = table.record(central.row)
            _, *size = central.shape
            covering = covering_size(record.height, record.width, *size)
            free = covering[0] - size[0], covering[1] - size[1]
            seen = set()
            for variant in range(variants):
                sample = central
                if variant:
                    seed = derive_seed(val.seed, "variant", central.sample_id, variant)
                    place = Place(central.row, 0, (0, 0))
                    sample = draws.sample(0, place, record, central.bucket, seed, augment=True)
                cut = sample.times, corner(free, sample.crop)
                if cut not in seen:
                    seen.add(cut)
                    yield Cut(sample, variant)


def latent_meta(samples: SampleReader, cut: Cut) -> dict[str, Any]:
    """key.json of a cut's latents: what the clip's own said, and how it was cut."""
    sample = cut.sample
    meta = samples.meta(sample)
    frames, height, width = sample.shape
    fields = {name: meta.fields[name] for name in PASSED_ON if meta.fields.get(name) is not None}
    return {
        "captions": meta.captions,
        "frames": frames,
        "height": height,
        "width": width,
        "fps": sample.fps,
        "source_id": sample.key,
        **fields,
        "variant": {
            "index": cut.variant,
            "times": sample.times,
            "crop": sample.crop,
            "fps": sample.fps,
        },
    }


def text_cache(config: TextConfig) -> TextCache:
    """What is kept of captions: ids where the encoder learns with the DiT, else embeddings."""
    kind = "tokens" if config.is_trained else "embeddings"
    return TextCache(kind, text_hash(config), config.max_length)
