"""`longtake evaluate RUN --clips SHARDS`: scores of a DiT on captioned clips without truth records.

Clips are cut as training cuts them, at the centre. For each task the run draws every clip anew from
its caption and what the task gives of it, and what it drew is measured beside the clip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.progress import Progress, track

from longtake.data.config import CostConfig, DataConfig, DatasetConfig
from longtake.data.latents import read_manifest, refuse_other_vae
from longtake.data.loader import read_batches
from longtake.data.plan.compile import open_tables
from longtake.data.plan.val_plan import ValPlan
from longtake.models.conditioning import GIVES_NOTHING
from longtake.train.checks import require
from longtake.train.clips_card import (
    ENDINGS,
    MEASURES,
    MEMORISED_PERCENT,
    ClipsCard,
    Measure,
    score_task,
    write_clips_card,
)
from longtake.train.clips_judge import Findings, Judge
from longtake.train.codec import Codec, find_manifest, load_codec
from longtake.train.fidelity import (
    ClipScorer,
    NearestNeighbours,
    TrainingClips,
    VideoDetector,
    check_enough_clips,
    frechet_distance,
)
from longtake.train.frame_rate import catalogue_rates
from longtake.train.given_files import check_task
from longtake.train.painter import Painter, sampler_of
from longtake.train.run_folder import check_replaceable, written_whole
from longtake.train.runs import LoadedDiT, load_dit, pick_device

CARD, ROWS, VIDEOS = "clips_card.json", "clips.parquet", "videos"


@dataclass(frozen=True)
class ClipsOptions:
    """Which clips, what to draw, what to measure. None stands for the run's own value."""

    where: str = ""  # filter over the catalogue's columns, as data.val.*.where
    catalogue: Path | None = None
    num_clips: int = 256
    caption_kind: str | None = None
    tasks: tuple[str, ...] | None = None
    fps: float | None = None
    memorisation: bool = True
    train: Path | None = None  # shards to search for the nearest clip, instead of data.train
    fvd_weights: Path | None = None  # TorchScript file: loading it runs the code it holds
    clip_model: Path | None = None  # folder of a transformers CLIP
    num_shown: int = 4  # clips whose videos are kept
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    solver: str | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        require(self.fps is None or self.fps > 0, f"fps={self.fps} must be positive")


@dataclass(frozen=True)
class ClipsResult:
    """The card, and the folder that holds it with clips.parquet and videos/."""

    card: ClipsCard
    folder: Path


def evaluate_clips(
    run_path: Path,
    shards: Path,
    options: ClipsOptions,
    out: Path | None = None,
    *,
    weights: str = "ema",
    vae: Path | None = None,
    device: str = "auto",
) -> ClipsResult:
    """Draw, measure and write the folder; equal arguments give equal numbers.

    `shards` hold clips with captions, and a catalogue. ValueError, before anything is drawn, for
    shards that hold no clip of the run's shapes, a task it was not trained on, or weights of
    metrics that cannot be used.
    """
    place = pick_device(device)
    run = load_dit(run_path, weights, place)
    tasks = options.tasks or tuple(run.config.trained_tasks)
    for task in tasks:
        check_task(run.config, task)
    codec = load_codec(run.config, folder=run.place.folder, vae=vae, device=place)
    sampler = sampler_of(
        run.config, options.steps, options.guidance_scale, options.shift, options.solver
    )
    painter = Painter(run, codec, sampler, precision=run.config.engine.precision)
    training = open_training(run, codec, options, place) if options.memorisation else None
    plan = plan_clips(run, codec, shards, options)
    detector = open_detector(plan, options.fvd_weights, place)
    scorer = ClipScorer(options.clip_model, place) if options.clip_model else None
    folder = out or run.place.folder / "evaluation" / f"clips-{weights}"
    check_replaceable(folder, CARD)
    with written_whole(folder) as scratch:
        (scratch / VIDEOS).mkdir()
        judge = Judge(
            *(painter, codec, detector, scorer, options.seed),
            folder=scratch / VIDEOS,
            num_shown=options.num_shown,
        )
        with Progress() as progress:
            batches = plan.micro_batches(0, 1)
            bar = progress.add_task("draw", total=len(batches) * len(tasks))
            for batch in read_batches(plan.tables, plan.config, batches):
                judge.measure(batch, tasks)
                progress.advance(bar, len(tasks))
        if training is not None:
            search(training, judge.found, options.batch_size)
        about = {
            "run": run.place.folder.name,
            "step": run.place.step,
            "weights": weights,
            "shards": str(shards),
            "fingerprint": plan.tables[0].info.fingerprint,
            "where": options.where,
            "captions": plan.config.val[0].captions,
            "fps": plan.config.fps,
            "seed": options.seed,
            "sampler": asdict(sampler),
        }
        card = build_card(judge, plan, training, tasks, options, about)
        pq.write_table(to_table(judge.found.rows), scratch / ROWS)
        write_clips_card(card, scratch / CARD)
    return ClipsResult(card, folder)


def open_training(
    run: LoadedDiT, codec: Codec, options: ClipsOptions, device: torch.device
) -> TrainingClips:
    """The run's training set, or the shards that stand in for it.

    ValueError when it cannot be opened, or holds latents of another VAE.
    """
    data = run.config.data
    if options.train is not None:
        dataset = DatasetConfig(str(options.train), captions=data.train[0].captions)
        data = replace(clip_settings(run, codec), train=[dataset])
    try:
        tables = open_tables(data.train, data, must_fill=True)
        for table in tables:
            if table.info.holds_latents and codec.vae is None:
                raise ValueError(f"{table.root}: holds latents, a run with codec=identity has none")
            if table.info.holds_latents:
                wanted = find_manifest(run.config, run.place.folder)[0].vae_hash
                refuse_other_vae(read_manifest(table.root), wanted)
    except ValueError as error:
        raise ValueError(
            f"the training set cannot be searched: {error}; give its shards by --train-shards, or "
            "leave the search out by --no-memorisation"
        ) from error
    return TrainingClips(tables, data, codec, device)


def clip_settings(run: LoadedDiT, codec: Codec) -> DataConfig:
    """How pixels become clips of the run's shapes: its own config, or its VAE's where that is what
    read them (as `longtake encode` does)."""
    data = run.config.data if codec.loaded is None else codec.loaded.config.data
    return replace(data, buckets=run.config.data.buckets, grid=None, cost=CostConfig(), pack=False)


def plan_clips(
    run: LoadedDiT,
    codec: Codec,
    shards: Path,
    options: ClipsOptions,
) -> ValPlan:
    """The first `num_clips` clips that fit, as in a validation pass; ValueError for none."""
    settings = clip_settings(run, codec)
    own = run.config.data.train[0].captions
    cached = catalogue_rates(run.config)[0] if codec.vae is not None else None
    dataset = DatasetConfig(
        str(shards),
        None if options.catalogue is None else str(options.catalogue),
        where=options.where,
        captions={options.caption_kind: 1.0} if options.caption_kind else own,
    )
    config = replace(
        settings,
        val=[dataset],
        buckets=[replace(bucket, batch_size=options.batch_size) for bucket in settings.buckets],
        fps=options.fps or cached or settings.fps,
    )
    for bucket in config.buckets:
        shape = codec.latent_shape(*bucket.shape)
        run.dit.config.grid(shape[1:])
    plan = ValPlan.from_config(config, run.config.seed, options.num_clips)
    if plan.tables[0].info.holds_latents:
        raise ValueError(f"{shards}: holds latents; give the shards of clips they were made from")
    return plan


def open_detector(plan: ValPlan, path: Path | None, device: torch.device) -> VideoDetector | None:
    """The detector of FVD; ValueError when it cannot take the clips, or they are too few."""
    if path is None:
        return None
    detector = VideoDetector(path, device)
    samples = [sample for batch in plan.micro_batches(0, 1) for sample in batch.samples]
    for shape in sorted({sample.shape for sample in samples}):
        features = detector(torch.zeros(1, 3, *shape))
        check_enough_clips(len(samples), features.shape[1])
    return detector


def search(training: TrainingClips, found: Findings, batch_size: int) -> None:
    """Write into the rows which training clip lies nearest to each clip, and how far off."""
    for shape, points in found.points.items():
        neighbours = NearestNeighbours(
            torch.stack([point.latents for point in points]).to(training.device)
        )
        for latents, samples in track(training.batches(shape, batch_size), "search", total=None):
            neighbours.update(latents, samples)
        results = zip(points, neighbours.distance.tolist(), neighbours.nearest, strict=True)
        for point, distance, sample in results:
            if sample is None:
                continue  # there is no training clip of this shape
            for row in point.rows:
                row[f"distance{point.ending}"] = distance
                row[f"nearest_id{point.ending}"] = sample.sample_id
                row[f"nearest_key{point.ending}"] = sample.key


def to_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """clips.parquet: a row for each clip and task, a column for whatever was measured."""
    texts = ("key", "task", "caption", "nearest_key", "nearest_key_truth")
    ids = ("sample_id", "nearest_id", "nearest_id_truth")
    sizes = ("frames", "height", "width")
    numbers = ("fps", *(name + ending for name in MEASURES for ending in ENDINGS))
    kinds = {pa.string(): texts, pa.uint64(): ids, pa.int32(): sizes, pa.float64(): numbers}
    present = {name for row in rows for name in row}
    fields = [(name, kind) for kind, names in kinds.items() for name in names if name in present]
    return pa.Table.from_pylist(list(rows), pa.schema(fields))


def build_card(
    judge: Judge,
    plan: ValPlan,
    training: TrainingClips | None,
    tasks: Sequence[str],
    options: ClipsOptions,
    about: dict[str, Any],
) -> ClipsCard:
    """Means by task, and a line on all that is missing; ValueError when nothing was drawn."""
    found = judge.found
    left_out = [line.strip() for line in plan.tables[0].drops()[1:]]
    if (rest := plan.tables[0].num_samples - options.num_clips) > 0:
        left_out.append(f"behind the first {options.num_clips}: {rest}")
    left_out += [f"{why}: {count}" for why, count in found.left_out.items()]
    if not found.rows:
        raise ValueError(f"{about['shards']}: nothing was drawn: " + "; ".join(left_out))
    gaps = missing(options, tasks, found)
    scores = []
    for task in tasks:
        rows = [row for row in found.rows if row["task"] == task]
        further = memorised(rows)
        if found.features[task]:
            truth, drawn = (torch.cat(x) for x in zip(*found.features[task], strict=True))
            try:
                further.append(Measure("fvd", frechet_distance(truth, drawn)))
            except ValueError as error:
                gaps.append(f"task {task}: {error}")
        if rows:
            scores.append(score_task(task, rows, further))
    if training is not None:
        about["training clips searched"] = training.num_read
        if training.unreadable:
            first = training.unreadable[0]
            left_out.append(f"training clips not read: {len(training.unreadable)}, first {first}")
    return ClipsCard(about, tuple(scores), tuple(left_out), tuple(gaps))


def missing(options: ClipsOptions, tasks: Sequence[str], found: Findings) -> list[str]:
    """What was not measured, and what would have it measured."""
    gaps = []
    if options.fvd_weights is None:
        gaps.append("FVD: give --fvd-weights FILE, a TorchScript detector such as I3D")
    if options.clip_model is None:
        gaps.append("CLIP score: give --clip-model FOLDER, a CLIP of transformers")
    if not options.memorisation:
        gaps.append("distance to the training set: leave out --no-memorisation")
    elif absent := [row for row in found.rows if "distance" not in row]:
        sizes = sorted({"{frames}x{height}x{width}".format(**row) for row in absent})
        gaps.append(f"distance to the training set, which holds no clip of {', '.join(sizes)}")
    if known := sum(row.get("distance_truth") == 0 for row in found.rows):
        gaps.append(f"memorisation: {known} rows are of clips that the run was trained on")
    if GIVES_NOTHING.issuperset(tasks):
        gaps.append("PSNR, SSIM: no task gives frames that a true clip would continue")
    if all(row["flicker"] is None for row in found.rows):
        gaps.append("flicker: no clip has three frames")
    if not any("loss" in row for row in found.rows):
        gaps.append("validation loss: validation.noise_levels of the run is empty")
    return gaps


def memorised(rows: Sequence[Mapping[str, Any]]) -> list[Measure]:
    """The share of drawn clips that lie nearer to the training set than all but MEMORISED_PERCENT
    of the true ones; true clips of another source than the training set are needed to judge by it.
    """
    pairs = [(row["distance"], row["distance_truth"]) for row in rows if "distance" in row]
    if not pairs:
        return []
    drawn, truth = np.array(pairs).T
    level = np.percentile(truth, MEMORISED_PERCENT, method="lower")
    return [Measure("memorised", float((drawn < level).mean()), MEMORISED_PERCENT / 100)]
