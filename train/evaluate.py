"""`longtake evaluate RUN`: draw world prompts from a run, score them beside chance and ceiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from longtake.data.catalogue import load_catalogue
from longtake.data.decode import encode_image, encode_video
from longtake.data.world import FAMILIES
from longtake.train.card import (
    Card,
    ClipScores,
    Score,
    build_card,
    card_row,
    write_card,
    write_rows,
)
from longtake.train.checks import choice, require
from longtake.train.codec import Codec, load_codec, time_stride
from longtake.train.config import to_tree
from longtake.train.frame_rate import drawn_rates
from longtake.train.given_files import check_task
from longtake.train.painter import Painter, sampler_of
from longtake.train.ranks import Ranks, single_process
from longtake.train.run_folder import check_replaceable, written_whole
from longtake.train.runs import RunPlace, find_run, load_dit, read_run_config
from longtake.train.schema import DiTRun
from longtake.train.tracking import send_evaluation
from longtake.train.world_prompts import (
    PromptSet,
    Scored,
    Scorer,
    batches,
    prompts,
    prompts_for,
    rebuild,
    shapes_for,
)

ROWS, CARD = "clips.parquet", "card.json"


@dataclass(frozen=True)
class EvaluateOptions:
    """What to draw and score. None stands for the run's own value."""

    families: tuple[str, ...] | None = None  # those of the training data
    splits: tuple[str, ...] = ("val", "combo", "ood")
    num_prompts: int = 64  # per family and split
    num_pairs: int | None = None  # of them in val, with a twin that differs in one word; all
    drift: int = 1  # videos up to so many times the trained length
    caption_kind: str | None = None  # the kind the run saw most
    tasks: tuple[str, ...] | None = None  # those it was trained on
    weights: tuple[str, ...] = ("ema", "raw")
    frames: int | None = None
    size: tuple[int, int] | None = None  # (height, width)
    num_shown: int = 4  # clips per family, split and task whose videos are kept
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    solver: str | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        require(self.batch_size > 0, f"batch_size={self.batch_size} must be at least 1")


@dataclass(frozen=True)
class EvaluationResult:
    """The card, and the folder that holds it with clips.parquet and videos/."""

    card: Card
    folder: Path


def evaluate_run(
    path: Path,
    options: EvaluateOptions,
    out: Path | None = None,
    *,
    vae: Path | None = None,
    ranks: Ranks | None = None,
) -> EvaluationResult:
    """Draw, score and write the folder; equal arguments give equal numbers at any number of ranks.

    The ceiling is what the codec makes of the same true clips. ValueError for families, splits or
    sizes that the run cannot draw, and for a task it was not trained on.
    """
    ranks = ranks or single_process()
    # a run in progress writes checkpoints: all ranks and weights take the one that rank 0 found
    checkpoint = ranks.broadcast(str(find_run(path).checkpoint) if ranks.is_main else "")
    place, config, wanted = check_run(Path(checkpoint), options)
    one = next(iter(wanted.values()))
    folder = out or place.folder / "evaluation" / "world"
    check_replaceable(folder, CARD)
    with written_whole(folder, ranks) as scratch:
        (scratch / "videos").mkdir(exist_ok=True)
        rows: list[ClipScores] = []
        scorer = Scorer(one.kind, one.seed)
        for weights in options.weights:
            painter = load_painter(place, config, options, weights, vae, ranks)
            for task, asked in wanted.items():
                rows += _score_task(painter, scorer, asked, task, weights, options, ranks, scratch)
        rows = in_order(ranks.gather([asdict(row) for row in rows]), wanted)
        about = {
            "run": place.folder.name,
            "step": place.step,
            "prompts": asdict(one),
            "shapes": {task: asked.shape for task, asked in wanted.items()},
            "sampler": asdict(painter.sampler),
        }
        num_cut = sum(ranks.gather(scorer.num_cut))
        cut = f"prompts cut at text.max_length={config.text.max_length}, and scored all the same"
        card = build_card(rows, about, {cut: num_cut} if num_cut else {})
        if ranks.is_main:
            write_rows(rows, scratch / ROWS)
            write_card(card, scratch / CARD)
    if ranks.is_main:
        show_in_tracking(place, config, card)
    return EvaluationResult(card, folder)


def check_run(
    path: Path, options: EvaluateOptions
) -> tuple[RunPlace, DiTRun, dict[str, PromptSet]]:
    """The run, its config, and what it is to be asked under each task; ValueError for what it
    cannot do."""
    place = find_run(path)
    config = read_run_config(place)
    if not isinstance(config, DiTRun):
        raise ValueError(f"{path}: a run of stage={config.stage} draws no videos; give a DiT run")
    return place, config, resolve(config, options, time_stride(config, place.folder))


def show_in_tracking(place: RunPlace, config: DiTRun, card: Card) -> None:
    """Show the card in the run's W&B, where it has one."""
    columns = tuple(Score.__dataclass_fields__)
    rows = [[getattr(score, name) for name in columns] for score in card.scores]
    row = {f"evaluate/{name}": value for name, value in card_row(card).items()}
    row["step"] = place.step
    send_evaluation(place.folder, config.tracking, to_tree(config), row, (columns, rows))


def resolve(config: DiTRun, options: EvaluateOptions, stride: int) -> dict[str, PromptSet]:
    """By task, the options with the run's own values put in; `stride` is the codec's in time.
    ValueError for what the run cannot do."""
    for weights in options.weights:
        choice("weights", weights, ("ema", "raw"))
    families, rates = options.families or trained_families(config), drawn_rates(config)
    for task in options.tasks or ():
        check_task(config, task)
    return {
        task: prompts_for(
            *(config, task, families, options.caption_kind),
            *(shapes_for(config, task, stride, options.frames, options.size), rates),
            splits=options.splits,
            num_prompts=options.num_prompts,
            num_pairs=options.num_prompts if options.num_pairs is None else options.num_pairs,
            drift=options.drift,
            seed=options.seed,
        )
        for task in options.tasks or config.trained_tasks
    }


def trained_families(config: DiTRun) -> tuple[str, ...]:
    """World families in the training data of a run.

    ValueError when the data is no longer there, or holds none: then they must be named.
    """
    found: set[str] = set()
    for dataset in config.data.train:
        try:
            catalogue = load_catalogue(dataset.path, dataset.catalogue).filter(dataset.where)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"data.train: {error}; name the families to ask for with --families"
            ) from error
        found |= set(catalogue.catalogue.table["family"].unique().to_pylist())
    families = tuple(sorted(found & set(FAMILIES)))
    if not families:
        raise ValueError(
            "data.train holds no family of the world: name some with --families, or score the run "
            "on clips of your own with --clips"
        )
    return families


def load_painter(
    place: RunPlace,
    config: DiTRun,
    options: EvaluateOptions,
    weights: str,
    vae: Path | None,
    ranks: Ranks,
) -> Painter:
    """The run's modules and sampler, ready to draw on this rank's device."""
    run = load_dit(place.checkpoint, weights, ranks.device)
    codec = load_codec(config, folder=place.folder, vae=vae, device=ranks.device)
    sampler = sampler_of(
        config, options.steps, options.guidance_scale, options.shift, options.solver
    )
    return Painter(run, codec, sampler, precision=config.engine.precision)


def _score_task(
    painter: Painter,
    scorer: Scorer,
    wanted: PromptSet,
    task: str,
    weights: str,
    options: EvaluateOptions,
    ranks: Ranks,
    folder: Path,
) -> list[ClipScores]:
    """Rows of this rank's share of the prompts; the first of each group keep their videos."""
    share = ranks.rank, ranks.world_size
    items = prompts(wanted, task, painter.codec.strides[0], *share)
    total = len(wanted.jobs(task)[ranks.rank :: ranks.world_size])
    rows = []
    with Progress(disable=not ranks.is_main) as progress:
        bar = progress.add_task(f"{weights} {task}", total=total)
        for batch in batches(items, options.batch_size):
            for scored in scorer.batch(painter, batch, task, weights):
                clip = scored.prompt.clip
                index = int(clip.key.rpartition("-")[2])
                files = {}
                if index < options.num_shown and weights == options.weights[0]:
                    files = keep_videos(folder, scored, painter.codec)
                rows.append(replace(scored.row, files=files))
                progress.advance(bar)
    return rows


def in_order(
    parts: Sequence[Sequence[dict[str, Any]]], wanted: Mapping[str, PromptSet]
) -> list[ClipScores]:
    """The rows of all ranks in the order of one: weights and tasks as drawn, then split, family
    and key."""
    rows = [ClipScores(**row) for part in parts for row in part]
    groups = list(dict.fromkeys((row.weights, row.task) for row in rows))
    splits = next(iter(wanted.values())).splits
    return sorted(
        rows,
        key=lambda row: (
            groups.index((row.weights, row.task)),
            splits.index(row.split) if row.split in splits else len(splits),
            wanted[row.task].families.index(row.family),
            row.key,
        ),
    )


def keep_videos(folder: Path, scored: Scored, codec: Codec) -> dict[str, str]:
    """Write drawn video, reconstruction and truth as 4:4:4 mp4 (png for images); label → file."""
    clip, row = scored.prompt.clip, scored.row
    views = {"drawn": scored.video}
    if codec.vae is not None:
        views["VAE"] = rebuild(codec, scored.prompt)[0]
    views["truth"] = clip.frames
    files = {}
    for label, frames in views.items():
        is_image = len(frames) == 1
        stem = f"{row.task}-{row.family}-{row.key}-{label.lower()}"
        name = f"videos/{stem}.{'png' if is_image else 'mp4'}"
        data = encode_image(frames[0]) if is_image else encode_video(frames, clip.fps)
        (folder / name).write_bytes(data)
        files[label] = name
    return files
