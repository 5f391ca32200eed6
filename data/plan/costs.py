"""What samples of each bucket cost, and the micro-batches that follow from it."""

import math
from dataclasses import replace

from longtake.data.config import BucketConfig, CostConfig, DataConfig, GridConfig

_ASPECT_STEP = 4 / 3  # neighbouring aspect ratios of a grid: cropping costs at most 1 - sqrt(3/4)


def resolve_buckets(config: DataConfig) -> DataConfig:
    """The config with `grid` written out as buckets and every batch size filled in.

    A resolved config is returned as it is.

    Raises:
        ValueError: a bucket over `cost.max_tokens`, or a batch size that cannot be worked out.
    """
    buckets = list(config.buckets)
    if config.grid is not None:
        named = {bucket.name for bucket in buckets}
        buckets += [bucket for bucket in _grid(config.grid) if bucket.name not in named]
    cost = config.cost
    unknown = sorted(set(cost.seconds) - {bucket.name for bucket in buckets})
    missing = [
        bucket.name for bucket in buckets if cost.seconds and bucket.name not in cost.seconds
    ]
    if unknown or missing:
        raise ValueError(
            f"data.cost.seconds must name every bucket or none: without seconds {missing}, "
            f"no buckets {unknown}"
        )
    for index, bucket in enumerate(buckets):
        tokens = num_tokens(bucket, cost)
        size = 1 if config.pack else bucket.batch_size or 1
        if cost.max_tokens is not None and size * tokens > cost.max_tokens:
            raise ValueError(
                f"data.buckets[{index}] {bucket.name}: {size} samples of {tokens} tokens are over "
                f"data.cost.max_tokens={cost.max_tokens}; lower its batch_size or its shape"
            )
    if not config.pack:
        buckets = _fill_batch_sizes(buckets, cost)
    return replace(config, buckets=buckets, grid=None)


def num_tokens(bucket: BucketConfig, cost: CostConfig) -> int:
    """Tokens of one sample; the first frame makes tokens of its own (1 + 4k frames)."""
    frames, height, width = cost.token
    times = 1 + -(-(bucket.frames - 1) // frames)
    return times * -(-bucket.height // height) * -(-bucket.width // width)


def samples_a_step(bucket: BucketConfig, config: DataConfig) -> int:
    """What a bucket needs to fill a step of its own; one for each lane where buckets are packed."""
    return config.micro_batches_per_step * (1 if config.pack else bucket.batch_size or 1)


def micro_batch_size(bucket: BucketConfig, config: DataConfig) -> int:
    """Samples of a micro-batch of this bucket alone: with packs, as many as the cap holds.

    `config` is resolved.
    """
    if not config.pack:
        assert bucket.batch_size is not None
        return bucket.batch_size
    assert config.cost.max_tokens is not None
    return config.cost.max_tokens // num_tokens(bucket, config.cost)


def sample_cost(bucket: BucketConfig, cost: CostConfig) -> float:
    """Measured seconds of one sample, or the formula 84 d² + 12 N d per token and layer."""
    if cost.seconds:
        return cost.seconds[bucket.name]
    tokens = num_tokens(bucket, cost)
    return float(tokens * (84 * cost.hidden_size**2 + 12 * tokens * cost.hidden_size))


def pack_size(buckets: list[BucketConfig], weights: list[int], cost: CostConfig) -> int:
    """How many samples a pack holds so that no pack of the endless mixture is over the cap.

    Raises:
        ValueError: not even a pack of one sample is within it.
    """
    assert cost.max_tokens is not None
    tokens = [num_tokens(bucket, cost) for bucket in buckets]
    mean = sum(t * w for t, w in zip(tokens, weights, strict=True)) / sum(weights)
    for size in range(int(cost.max_tokens / mean), 0, -1):
        if _most_tokens(size, tokens, weights) <= cost.max_tokens:
            return size
    raise ValueError(
        f"data.cost.max_tokens={cost.max_tokens} holds no pack: the largest bucket alone has "
        f"{max(tokens)} tokens"
    )


def _grid(grid: GridConfig) -> list[BucketConfig]:
    """Shapes of nearly the wanted areas, none above, from tall to wide."""
    steps = math.floor(math.log(grid.max_aspect) / math.log(_ASPECT_STEP) + 1e-9)
    aspects = [_ASPECT_STEP**step for step in range(-steps, steps + 1)]
    shapes: dict[tuple[int, int, int], None] = {}
    for frames in grid.frames:
        for area in grid.areas:
            for aspect in aspects:
                height = _round_down(math.sqrt(area / aspect), grid.multiple)
                nearest = max(1, round(height * aspect / grid.multiple)) * grid.multiple
                width = min(nearest, _round_down(area / height, grid.multiple))
                if height * width <= area:
                    shapes[frames, height, width] = None
    return [BucketConfig(*shape, grid.batch_size, optional=True) for shape in shapes]


def _round_down(length: float, multiple: int) -> int:
    return max(1, math.floor(length / multiple + 1e-9)) * multiple


def _fill_batch_sizes(buckets: list[BucketConfig], cost: CostConfig) -> list[BucketConfig]:
    """Steps of every bucket should cost what a full step of the costliest one does."""
    if all(bucket.batch_size is not None for bucket in buckets):
        return buckets
    if cost.max_tokens is None:
        name = next(bucket.name for bucket in buckets if bucket.batch_size is None)
        raise ValueError(
            f"data.buckets {name} has no batch_size: give it one, or set data.cost.max_tokens"
        )
    costs = [sample_cost(bucket, cost) for bucket in buckets]
    room = [cost.max_tokens // num_tokens(bucket, cost) for bucket in buckets]
    target = max(c * r for c, r in zip(costs, room, strict=True))
    return [
        replace(bucket, batch_size=bucket.batch_size or max(1, min(most, round(target / each))))
        for bucket, each, most in zip(buckets, costs, room, strict=True)
    ]


def _most_tokens(size: int, tokens: list[int], weights: list[int]) -> int:
    """Upper bound for `size` neighbouring positions of `lanes.interleave`: item i takes the floor
    or the ceiling of its share of what the items before it left."""
    best = {size: 0}  # positions left -> most tokens so far
    total = sum(weights)
    for each, weight in zip(tokens, weights, strict=True):
        if not weight:
            continue
        found: dict[int, int] = {}
        for left, spent in best.items():
            for taken in {left * weight // total, -(-left * weight // total)}:
                value = spent + taken * each
                found[left - taken] = max(found.get(left - taken, 0), value)
        best, total = found, total - weight
    return best[0]
