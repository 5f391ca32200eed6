"""What the data config says, checked; the training config embeds these dataclasses."""

import math
from dataclasses import dataclass, field

from longtake.data.decode import DECODERS

MAX_CAPTION_KINDS = 16


@dataclass
class BucketConfig:
    """Clips of one shape: `frames` x `height` x `width` pixels, `batch_size` in a micro-batch."""

    frames: int
    height: int
    width: int
    batch_size: int

    @property
    def name(self) -> str:
        """Shape as printed in messages."""
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass
class DatasetConfig:
    """A folder of shards. `weight` 2 shows its samples twice as often as those of weight 1.

    `catalogue` is its folder where the shards are read-only, `where` an SQL-like filter over the
    catalogue's columns, `captions` the share of each caption kind.
    """

    path: str
    catalogue: str | None = None
    where: str = ""
    weight: float = 1.0
    captions: dict[str, float] = field(default_factory=lambda: {"dense": 1.0})


@dataclass
class DataConfig:
    """Training and validation data, the shapes to cut from them, and how to load.

    `fps` resamples clips to one rate (None: each at its own); `crop` is center or random, `window`
    says which part of a longer clip is taken: start, center or random. `shuffle_shards` is the
    shuffle window inside a lane. `max_bad_fraction` of excluded samples stops the run.
    """

    train: list[DatasetConfig] = field(default_factory=list)
    val: list[DatasetConfig] = field(default_factory=list)
    buckets: list[BucketConfig] = field(default_factory=list)
    micro_batches_per_step: int = 8
    fps: float | None = None
    crop: str = "center"
    window: str = "random"
    shuffle_shards: int = 16
    decoder: str = "auto"
    num_workers: int = 0
    prefetch_factor: int = 4
    max_bad_fraction: float = 0.05


def check_data_config(config: DataConfig) -> None:
    """Raises:
    ValueError: naming the key, the value, the rule and the remedy.
    """
    for key, value, low in (
        ("micro_batches_per_step", config.micro_batches_per_step, 1),
        ("shuffle_shards", config.shuffle_shards, 1),
        ("num_workers", config.num_workers, 0),
        ("prefetch_factor", config.prefetch_factor, 1),
    ):
        if value < low:
            raise ValueError(f"data.{key}={value} must be at least {low}")
    for key, value, choices in (
        ("crop", config.crop, ("center", "random")),
        ("window", config.window, ("start", "center", "random")),
        ("decoder", config.decoder, DECODERS),
    ):
        if value not in choices:
            raise ValueError(f"data.{key}={value!r} must be one of {', '.join(choices)}")
    if config.fps is not None and not (math.isfinite(config.fps) and config.fps > 0):
        raise ValueError(
            f"data.fps={config.fps} must be positive, or null to keep each clip's rate"
        )
    if not 0 <= config.max_bad_fraction <= 1:
        raise ValueError(f"data.max_bad_fraction={config.max_bad_fraction} must lie in 0..1")
    _check_buckets(config.buckets)
    for name, datasets in (("train", config.train), ("val", config.val)):
        for index, dataset in enumerate(datasets):
            _check_dataset(dataset, f"data.{name}[{index}]")


def _check_buckets(buckets: list[BucketConfig]) -> None:
    if not buckets:
        raise ValueError("data.buckets=[] must list at least one shape with its batch_size")
    for index, bucket in enumerate(buckets):
        for key in ("frames", "height", "width", "batch_size"):
            value = getattr(bucket, key)
            if value < 1:
                raise ValueError(f"data.buckets[{index}].{key}={value} must be at least 1")
    names = [bucket.name for bucket in buckets]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"data.buckets lists {name} twice; give each shape once")


def _check_dataset(dataset: DatasetConfig, key: str) -> None:
    if not (math.isfinite(dataset.weight) and dataset.weight > 0):
        raise ValueError(
            f"{key}.weight={dataset.weight} must be positive; remove it to leave it out"
        )
    shares = dataset.captions
    if not shares or len(shares) > MAX_CAPTION_KINDS:
        raise ValueError(f"{key}.captions={shares} must name 1 to {MAX_CAPTION_KINDS} kinds")
    if any(not (math.isfinite(s) and s >= 0) for s in shares.values()) or not sum(shares.values()):
        raise ValueError(f"{key}.captions={shares}: shares must be >= 0 and not all 0")
