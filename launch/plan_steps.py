"""`longtake plan-steps`: what a run sees, step by step, for anybody to check."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from longtake.data.catalogue import CatalogueManifest, column, open_manifest, read_parts
from longtake.data.config import (
    MAX_CAPTION_KINDS,
    BucketConfig,
    DataConfig,
    DatasetConfig,
    GridConfig,
)
from longtake.data.plan import Plan, rank_slots
from longtake.data.plan.planned import Exclusion, MicroBatch
from longtake.launch.command import UserError
from longtake.launch.compose import compose
from longtake.train.checkpoint import TRAIN_STATE, list_steps
from longtake.train.config import load_config, parse_data_config
from longtake.train.health import Quarantine
from longtake.train.run_folder import CHECKPOINTS, CONFIG, QUARANTINE

_BATCH_SIZE = 2
_MAX_FRAMES = 81  # of a default bucket: 5 seconds at 16 fps


def print_steps(args: argparse.Namespace) -> None:
    """One JSON line per micro-batch; `args` are those of `longtake plan-steps`."""
    if args.rank is not None and not 0 <= args.rank < args.world_size:
        raise UserError(f"--rank={args.rank} must lie within --world-size={args.world_size}")
    plan, exclusions = _open_plan(args.words, args.catalogue)
    ranks = range(args.world_size) if args.rank is None else [args.rank]
    blocks = {rank: rank_slots(plan.num_slots, rank, args.world_size) for rank in ranks}
    print(plan.summary(), file=sys.stderr)
    fetched = dict.fromkeys(sorted({rank // args.ranks_per_node for rank in ranks}), 0)
    for step in args.steps:
        for rank, slots in blocks.items():
            for slot in slots:
                batch = plan.micro_batch(step, slot, exclusions)
                line = _describe(batch, rank)
                if args.bytes:
                    sizes = [plan.num_bytes(sample) for sample in batch.samples]
                    line["bytes"] = sum(sizes)
                    fetched[rank // args.ranks_per_node] += sum(sizes)
                print(json.dumps(line))
    if args.bytes:
        for node, size in fetched.items():
            print(json.dumps({"node": node, "bytes": size}))


def _describe(batch: MicroBatch, rank: int) -> dict[str, Any]:
    return {
        "step": batch.step,
        "slot": batch.slot,
        "rank": rank,
        "shapes": [sample.shape for sample in batch.samples],
        "cost": batch.cost,
        "samples": [asdict(sample) for sample in batch.samples],
    }


def _open_plan(words: Sequence[str], catalogue: str | None) -> tuple[Plan, list[Exclusion]]:
    """The plan of some shards, of a run with its exclusions, or of a composed config."""
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    places = [word for word in words if word not in overrides]
    if len(places) > 1:
        raise UserError(f"give one folder, not {', '.join(places)}")
    if not places:
        config = compose(overrides)
        return Plan.from_config(config.data, config.seed), []
    if (Path(places[0]) / CONFIG).is_file():
        if overrides:
            raise UserError(f"{places[0]} is a run: its config is taken as it is")
        config = load_config(Path(places[0]) / CONFIG)
        rows = Quarantine.read_rows(Path(places[0]) / QUARANTINE, repair=False)
        exclusions = [Exclusion(**row) for row in rows]
        plan = Plan.from_config(config.data, config.seed)
        _refuse_other_data(Path(places[0]), plan)
        return plan, exclusions
    seeds = [word for word in overrides if word.startswith("seed=")]
    changes = [word for word in overrides if word not in seeds]
    manifest = open_manifest(places[0], catalogue)
    data = default_config(manifest, places[0], catalogue)
    if any(word.startswith("data.buckets=") for word in changes):
        data.grid = None
    data = parse_data_config(data, changes)
    seed = seeds[-1].removeprefix("seed=") if seeds else "0"
    if not seed.isdecimal():
        raise UserError(f"seed={seed} must be a whole number")
    return Plan.from_config(data, int(seed)), []


def default_config(manifest: CatalogueManifest, path: str, catalogue: str | None) -> DataConfig:
    """Buckets that nearly all samples fit, for a look at data that has no config yet: latents get
    the shapes they have, videos and images a grid that the smallest of them still fill."""
    names = ["frames", "width", "height", "codec", "caption_chars"]
    table = read_parts(manifest, list(manifest.shards), names)
    kinds = table["caption_chars"].combine_chunks().keys.unique().to_pylist()
    shares = dict.fromkeys(sorted(kinds)[:MAX_CAPTION_KINDS], 1.0)
    train = [DatasetConfig(path, catalogue, captions=shares)]
    frames, width, height = (column(table, name).astype(int) for name in names[:3])
    if (column(table, "codec").astype(str) == "latents").any():
        shapes = sorted({*zip(frames.tolist(), height.tolist(), width.tolist(), strict=True)})
        buckets = [BucketConfig(*shape, _BATCH_SIZE, optional=True) for shape in shapes]
        return DataConfig(train=train, buckets=buckets)
    videos = frames[frames > 1]
    lengths = [1] if len(videos) < len(frames) else []
    if len(videos):
        lengths.append(1 + (min(int(videos.min()), _MAX_FRAMES) - 1) // 4 * 4)
    aspects = np.maximum(width / height, height / width)
    # Cropping to the nearest aspect ratio costs area: leave room for it.
    room = 1.0 if aspects.max() == aspects.min() else 0.6
    area = max(1, int(room * (width * height).min()))
    multiple = 16 if area >= 64**2 else 4 if area >= 16 else 1
    grid = GridConfig(
        sorted(set(lengths)), [area], multiple, min(4.0, float(aspects.max())), _BATCH_SIZE
    )
    return DataConfig(train=train, grid=grid)


def _refuse_other_data(run: Path, plan: Plan) -> None:
    """The data may have changed since, and another plan would show what the run never saw."""
    steps = list_steps(run / CHECKPOINTS)
    if not steps:
        return
    step, checkpoint = steps[0]
    saw = json.loads((checkpoint / TRAIN_STATE).read_text(encoding="utf-8"))["plan"]
    if saw != plan.fingerprint:
        raise UserError(
            f"{run}: its data or its config is not what it was trained on up to step {step} "
            f"(plan {saw}, now {plan.fingerprint}): put the shards and catalogue of that time back"
        )
