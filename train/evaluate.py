"""`longtake evaluate`: draw world prompts from a run and score them beside chance and ceiling."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from longtake.data.catalogue import Catalogue, load_catalogue
from longtake.data.decode import encode_image, encode_video
from longtake.data.randomness import derive_seed, numpy_rng
from longtake.data.samples import parse_meta
from longtake.data.shards import ShardReader, Span
from longtake.data.world.scorers import score_clip
from longtake.train.card import Card, ClipScores, build_card, write_card
from longtake.train.codec import Codec, load_codec
from longtake.train.playback import Footage, read_footage, to_frames, to_pixels
from longtake.train.run_folder import check_replaceable
from longtake.train.runs import load_dit, pick_device
from longtake.train.sample import Painter, check_task, noise_for, sampler_of
from longtake.train.schema import DiTRun

CLIPS, CARD = "clips.jsonl", "card.json"


@dataclass(frozen=True)
class EvaluateOptions:
    """What to draw and score. None stands for the run's or the shards' own value."""

    families: tuple[str, ...] | None = None
    split: str | None = None
    num_prompts: int = 64  # per family
    caption_kind: str | None = None
    task: str = "t2v"
    num_shown: int = 4  # clips per family whose videos are kept
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    batch_size: int = 32


@dataclass(frozen=True)
class WorldSample:
    """A clip of the world with the truth it was drawn from."""

    key: str
    family: str
    prompt: str
    truth: dict[str, Any]
    footage: Footage


@dataclass(frozen=True)
class EvaluationResult:
    """The card, and the folder that holds it with clips.jsonl and videos/."""

    card: Card
    folder: Path


def evaluate_run(
    path: Path,
    world: Path,
    options: EvaluateOptions,
    out: Path | None = None,
    *,
    weights: str = "ema",
    vae: Path | None = None,
    device: str = "auto",
) -> EvaluationResult:
    """Draw, score and write the folder; equal arguments give equal numbers.

    The ceiling is what the VAE makes of the same true clips. ValueError for shards without truth,
    clips that the run cannot draw, or a task it was not trained on.
    """
    run = load_dit(path, weights, pick_device(device))
    check_task(run.config, options.task)
    codec = load_codec(run.config, folder=run.place.folder, vae=vae, device=pick_device(device))
    sampler = sampler_of(run.config, options.steps, options.guidance_scale, options.shift)
    painter = Painter(run, codec, sampler, precision=run.config.engine.precision)
    catalogue = load_catalogue(world)
    kind = options.caption_kind or most_used_captions(run.config)
    rows = choose_rows(catalogue, options)
    split = rows[0]["split"] or "all"
    name = f"{split}-{options.task}-{weights}"
    folder = out or run.place.folder / "evaluation" / name
    check_replaceable(folder, CARD)
    shown = first_of_each(rows, options.num_shown)
    scratch = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    (scratch / "videos").mkdir(parents=True)
    scored = []
    try:
        with Progress() as progress, (scratch / CLIPS).open("w", encoding="utf-8") as file:
            bar = progress.add_task("evaluate", total=len(rows))
            for batch in read_batches(catalogue, rows, kind, options.batch_size):
                drawn = draw_batch(painter, codec, batch, options)
                for sample, frames, copy in zip(batch, drawn, rebuild(codec, batch), strict=True):
                    clip = score(sample, frames, copy, kind)
                    views = (frames, copy, sample.footage.frames) if sample.key in shown else ()
                    files = keep_videos(scratch, sample, views)
                    file.write(json.dumps({**asdict(clip), "files": files}) + "\n")
                    scored.append(clip)
                    progress.advance(bar)
        about = {
            "run": run.place.folder.name,
            "step": run.place.step,
            "weights": weights,
            "task": options.task,
            "captions": kind,
            "clips per family": options.num_prompts,
            "seed": options.seed,
            "sampler": asdict(sampler),
            "world": catalogue.fingerprint,
        }
        card = build_card(scored, split, about)
        write_card(card, scratch / CARD)
        replace_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return EvaluationResult(card, folder)


def most_used_captions(config: DiTRun) -> str:
    """The caption kind that the run saw most."""
    shares = config.data.train[0].captions
    return max(shares, key=lambda kind: shares[kind])


def choose_rows(catalogue: Catalogue, options: EvaluateOptions) -> list[dict[str, Any]]:
    """Catalogue rows of `num_prompts` clips per family, drawn from the seed, in key order.

    ValueError when a family or split is absent, or there are several splits and none was chosen.
    """
    rows = [row for row in catalogue.table.to_pylist() if row["family"] is not None]
    if not rows:
        raise ValueError(f"{catalogue.root}: no clip has a family; give shards of `longtake world`")
    splits = sorted({row["split"] for row in rows})
    if options.split is None and len(splits) > 1:
        raise ValueError(f"{catalogue.root}: holds the splits {', '.join(splits)}; choose --split")
    split = options.split or splits[0]
    families = options.families or tuple(sorted({row["family"] for row in rows}))
    chosen = []
    for family in families:
        mine = [row for row in rows if row["family"] == family and row["split"] == split]
        if not mine:
            raise ValueError(f"{catalogue.root}: holds no clip of family {family}, split {split}")
        mine.sort(key=lambda row: row["key"])
        order = numpy_rng(derive_seed(options.seed, family), "evaluate").permutation(len(mine))
        chosen += [mine[index] for index in sorted(order[: options.num_prompts].tolist())]
    return chosen


def first_of_each(rows: Sequence[dict[str, Any]], count: int) -> set[str]:
    """Keys of the first `count` rows of every family."""
    shown: dict[str, list[str]] = {}
    for row in rows:
        shown.setdefault(row["family"], []).append(row["key"])
    return {key for keys in shown.values() for key in keys[:count]}


def read_batches(
    catalogue: Catalogue, rows: Sequence[dict[str, Any]], kind: str, batch_size: int
) -> Iterator[list[WorldSample]]:
    """Samples in order, batched; a batch holds clips of one shape."""
    reader = ShardReader()
    batch: list[WorldSample] = []
    for row in rows:
        sample = read_sample(catalogue, row, kind, reader)
        shape = sample.footage.frames.shape
        if batch and (len(batch) == batch_size or batch[0].footage.frames.shape != shape):
            yield batch
            batch = []
        batch.append(sample)
    yield batch
    reader.close()


def read_sample(
    catalogue: Catalogue, row: dict[str, Any], kind: str, reader: ShardReader
) -> WorldSample:
    """Frames, caption and truth of a row; ValueError naming it when one is missing."""
    path, where = catalogue.root / row["shard"], f"{row['shard']}: {row['key']}"
    payload = reader.read(path, Span(row["payload_offset"], row["payload_size"]))
    text = reader.read(path, Span(row["meta_offset"], row["meta_size"]))
    meta = parse_meta(row["meta_ext"], text)
    if kind not in meta.captions:
        raise ValueError(f"{where} has no caption {kind!r}, only {', '.join(meta.captions)}")
    truth = meta.fields.get("truth")
    if not isinstance(truth, dict):
        raise ValueError(f"{where} has no truth record; give shards of `longtake world`")
    try:
        footage = read_footage(payload)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return WorldSample(row["key"], row["family"], meta.captions[kind], truth, footage)


def stack(batch: Sequence[WorldSample]) -> Tensor:
    """True clips as (B, 3, T, H, W) in [-1, 1]."""
    return torch.stack([to_pixels(sample.footage.frames) for sample in batch])


def draw_batch(
    painter: Painter, codec: Codec, batch: Sequence[WorldSample], options: EvaluateOptions
) -> list[np.ndarray]:
    """What the run draws for the batch's prompts; noise from (seed, key) alone."""
    shape = codec.latent_shape(*batch[0].footage.frames.shape[:3])
    painter.run.dit.config.grid(shape[1:])
    noise = [noise_for(derive_seed(options.seed, sample.key), shape) for sample in batch]
    first = stack(batch)[:, :, :1] if options.task == "i2v" else None
    video = painter.draw([sample.prompt for sample in batch], torch.stack(noise), first)
    return [to_frames(pixels) for pixels in video]


def rebuild(codec: Codec, batch: Sequence[WorldSample]) -> list[np.ndarray]:
    """The true clips through the codec and back: the best that any sampler can draw."""
    device = codec.mean.device if codec.mean is not None else "cpu"
    video = codec.decode(codec.encode(stack(batch).to(device)))
    return [to_frames(pixels) for pixels in video]


def score(sample: WorldSample, drawn: np.ndarray, copy: np.ndarray, kind: str) -> ClipScores:
    """The same scorers on what was drawn, on the reconstruction and on the truth.

    Only the scores that captions of this `kind` determine.
    """
    asked = kind if kind in sample.truth["asked"] else None
    return ClipScores(
        key=sample.key,
        family=sample.family,
        prompt=sample.prompt,
        drawn=score_clip(drawn, sample.truth, asked),
        ceiling=score_clip(copy, sample.truth, asked),
        truth=score_clip(sample.footage.frames, sample.truth, asked),
    )


def keep_videos(folder: Path, sample: WorldSample, views: Sequence[np.ndarray]) -> dict[str, str]:
    """Write drawn, reconstruction and truth as 4:4:4 mp4 (png for images); label → file name."""
    files = {}
    for label, frames in zip(("drawn", "VAE", "truth"), views, strict=False):
        is_image = len(frames) == 1
        stem = sample.key.replace("/", "_")
        name = f"videos/{stem}.{label.lower()}.{'png' if is_image else 'mp4'}"
        data = encode_image(frames[0]) if is_image else encode_video(frames, sample.footage.fps)
        (folder / name).write_bytes(data)
        files[label] = name
    return files


def replace_folder(scratch: Path, folder: Path) -> None:
    """Put a finished folder in its place; an older one goes only then."""
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    if folder.exists():
        os.replace(folder, old)
    os.replace(scratch, folder)
    shutil.rmtree(old, ignore_errors=True)
