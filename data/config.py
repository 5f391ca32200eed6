"""What the data config says, checked; the training config embeds these dataclasses."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from longtake.data.decode import DECODERS, RESIZES

MAX_CAPTION_KINDS = 16
_LEAST_WEIGHT = 1e-6


@dataclass
class BucketConfig:
    """Clips of one shape: `frames` x `height` x `width` pixels, `batch_size` in a micro-batch.

    `batch_size` None is worked out from `data.cost`. An `optional` bucket that cannot fill leaves
    its samples to the next best one; any other is an error.
    """

    frames: int
    height: int
    width: int
    batch_size: int | None = None
    optional: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height, width."""
        return self.frames, self.height, self.width

    @property
    def name(self) -> str:
        """Shape as printed in messages."""
        return shape_name(self.shape)


def shape_name(shape: Iterable[int]) -> str:
    """How clips (T, H, W) are called in messages and logs: 17x256x256."""
    return "x".join(map(str, shape))


@dataclass
class GridConfig:
    """Optional buckets of every frame count and area, at aspect ratios up to `max_aspect` (longer
    side / shorter side): heights and widths are multiples of `multiple` pixels. `batch_size` None
    is worked out from `data.cost`."""

    frames: list[int]
    areas: list[int]
    multiple: int = 16
    max_aspect: float = 2.0
    batch_size: int | None = None


@dataclass
class LengthShare:
    """A `share` of the samples goes to buckets of so many `frames`, though longer ones fit."""

    frames: int
    share: float


@dataclass
class CostConfig:
    """What a sample costs a training step.

    A token covers `token` = (frames, height, width) pixels, the first frame stands alone. N tokens
    cost N (84 d² + 12 N d) per layer with d = `hidden_size`, or, where `seconds` names the bucket,
    the measured seconds of one sample (name all or none). `max_tokens` caps a micro-batch.
    """

    hidden_size: int = 1024
    token: list[int] = field(default_factory=lambda: [4, 16, 16])
    max_tokens: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)


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
class CacheConfig:
    """What this node keeps: compiled plans, and samples of remote shards up to `max_bytes`.

    `folder` None stands for $LONGTAKE_CACHE, or $XDG_CACHE_HOME/longtake. A remote read is tried
    again `retries` times with growing pauses; each try may take `timeout` seconds.
    """

    folder: str | None = None
    max_bytes: int = 64 * 2**30
    retries: int = 5
    timeout: float = 60.0


@dataclass
class DataConfig:
    """Training and validation data, the shapes to cut from them, and how to load.

    `grid` adds buckets to those listed; `lengths` mix images and short clips in. With `pack` a
    micro-batch takes samples of all buckets up to `cost.max_tokens`, else samples of one bucket.
    `fps` resamples clips to one rate (None: each at its own); `crop` is center or random, `window`
    says which part of a longer clip is taken: start, center or random. `flip` mirrors half of the
    clips left to right, whatever their captions say of left and right. `shuffle_shards` is the
    shuffle window inside a lane. `resize` is fast or antialias. Clips are decoded in a child that
    is killed after `decode_timeout` seconds or beyond `decode_memory` bytes; with None they are
    decoded in the worker itself. `max_bad_fraction` of excluded samples stops the run.
    """

    train: list[DatasetConfig] = field(default_factory=list)
    val: list[DatasetConfig] = field(default_factory=list)
    buckets: list[BucketConfig] = field(default_factory=list)
    grid: GridConfig | None = None
    lengths: list[LengthShare] = field(default_factory=list)
    cost: CostConfig = field(default_factory=CostConfig)
    pack: bool = False
    micro_batches_per_step: int = 8
    fps: float | None = None
    crop: str = "center"
    flip: bool = False
    window: str = "random"
    shuffle_shards: int = 16
    decoder: str = "auto"
    resize: str = "fast"
    decode_timeout: float | None = 60.0
    decode_memory: int = 4 * 2**30
    num_workers: int = 0
    prefetch_factor: int = 4
    max_bad_fraction: float = 0.05
    cache: CacheConfig = field(default_factory=CacheConfig)


def check_data_config(config: DataConfig, wanted: str = "") -> None:
    """`wanted` is the list of datasets that must not be empty: train or val.

    Raises:
        ValueError: naming the key, the value, the rule and the remedy.
    """
    if wanted and not getattr(config, wanted):
        raise ValueError(f"data.{wanted}=[] must name at least one dataset")
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
        ("resize", config.resize, RESIZES),
    ):
        if value not in choices:
            raise ValueError(f"data.{key}={value!r} must be one of {', '.join(choices)}")
    if config.fps is not None and not (math.isfinite(config.fps) and config.fps > 0):
        raise ValueError(
            f"data.fps={config.fps} must be positive, or null to keep each clip's rate"
        )
    if config.decode_timeout is not None and not (
        math.isfinite(config.decode_timeout) and config.decode_timeout > 0
    ):
        raise ValueError(
            f"data.decode_timeout={config.decode_timeout} must be positive seconds, or null to "
            "decode in the worker itself"
        )
    if config.decode_memory < 2**28:
        raise ValueError(f"data.decode_memory={config.decode_memory} must be at least 256 MiB")
    _check_cache(config.cache)
    if not 0 <= config.max_bad_fraction <= 1:
        raise ValueError(f"data.max_bad_fraction={config.max_bad_fraction} must lie in 0..1")
    if config.grid is not None:
        _check_grid(config.grid)
    _check_cost(config)
    _check_buckets(config)
    for name, datasets in (("train", config.train), ("val", config.val)):
        for index, dataset in enumerate(datasets):
            _check_dataset(dataset, f"data.{name}[{index}]")


def _check_cache(cache: CacheConfig) -> None:
    for key, value, low in (("max_bytes", cache.max_bytes, 2**20), ("retries", cache.retries, 0)):
        if value < low:
            raise ValueError(f"data.cache.{key}={value} must be at least {low}")
    if not (math.isfinite(cache.timeout) and cache.timeout > 0):
        raise ValueError(f"data.cache.timeout={cache.timeout} must be positive seconds")


def _check_grid(grid: GridConfig) -> None:
    for key in ("frames", "areas"):
        values = getattr(grid, key)
        if not values or min(values) < 1:
            raise ValueError(f"data.grid.{key}={values} must list positive numbers")
    if grid.multiple < 1 or grid.multiple**2 > min(grid.areas):
        raise ValueError(
            f"data.grid.multiple={grid.multiple} must be positive, and its square within the "
            f"smallest of data.grid.areas={grid.areas}"
        )
    if grid.batch_size is not None and grid.batch_size < 1:
        raise ValueError(f"data.grid.batch_size={grid.batch_size} must be at least 1, or null")
    if not 1 <= grid.max_aspect <= 16:
        raise ValueError(f"data.grid.max_aspect={grid.max_aspect} must lie in 1..16")


def _check_cost(config: DataConfig) -> None:
    cost = config.cost
    if cost.hidden_size < 1:
        raise ValueError(f"data.cost.hidden_size={cost.hidden_size} must be at least 1")
    if len(cost.token) != 3 or min(cost.token) < 1:
        raise ValueError(f"data.cost.token={cost.token} must be [frames, height, width] in pixels")
    if cost.max_tokens is not None and cost.max_tokens < 1:
        raise ValueError(f"data.cost.max_tokens={cost.max_tokens} must be at least 1, or null")
    for name, seconds in cost.seconds.items():
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"data.cost.seconds.{name}={seconds} must be positive seconds")
    if config.pack and cost.max_tokens is None:
        raise ValueError("data.pack=true needs data.cost.max_tokens, the size of a pack")


def _check_buckets(config: DataConfig) -> None:
    if not config.buckets and config.grid is None:
        raise ValueError(
            "data.buckets=[] must list at least one shape, or data.grid describe several"
        )
    for index, bucket in enumerate(config.buckets):
        for key in ("frames", "height", "width", "batch_size"):
            value = getattr(bucket, key)
            if value is not None and value < 1:
                raise ValueError(f"data.buckets[{index}].{key}={value} must be at least 1")
    for index, length in enumerate(config.lengths):
        if not (math.isfinite(length.share) and length.share > 0):
            raise ValueError(f"data.lengths[{index}].share={length.share} must be positive")
    total = sum(length.share for length in config.lengths)
    if total > 1 + 1e-9:
        raise ValueError(f"data.lengths: shares sum to {total:g}, more than all samples")
    known = {bucket.frames for bucket in config.buckets}
    known |= set(config.grid.frames) if config.grid else set()
    lengths = [length.frames for length in config.lengths]
    for frames in lengths:
        if frames not in known or lengths.count(frames) > 1:
            raise ValueError(
                f"data.lengths names {lengths} frames: each must be that of a bucket, and named "
                f"once; there are buckets of {', '.join(map(str, sorted(known)))}"
            )
    names = [bucket.name for bucket in config.buckets]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"data.buckets lists {name} twice; give each shape once")


def _check_dataset(dataset: DatasetConfig, key: str) -> None:
    if not (math.isfinite(dataset.weight) and dataset.weight >= _LEAST_WEIGHT):
        raise ValueError(
            f"{key}.weight={dataset.weight} must be at least {_LEAST_WEIGHT}; remove the dataset "
            "to leave it out"
        )
    shares = dataset.captions
    if not shares or len(shares) > MAX_CAPTION_KINDS:
        raise ValueError(f"{key}.captions={shares} must name 1 to {MAX_CAPTION_KINDS} kinds")
    if any(not (math.isfinite(s) and s >= 0) for s in shares.values()) or not sum(shares.values()):
        raise ValueError(f"{key}.captions={shares}: shares must be >= 0 and not all 0")
