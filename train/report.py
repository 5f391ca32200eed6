"""`longtake report`: one HTML page of a run, and a picture of what it draws for a README."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from longtake.train.card import Card, read_card, read_rows
from longtake.train.config import load_config
from longtake.train.evaluate import ROWS
from longtake.train.playback import enlarge, read_footage_file, viewing_mp4
from longtake.train.report_curves import read_series, svg
from longtake.train.report_matrix import CELL
from longtake.train.report_page import (
    ClipCard,
    ScoreRow,
    View,
    clip_grid,
    curve_grid,
    facts,
    folded,
    hidden,
    note,
    page,
    score_table,
)
from longtake.train.report_picture import PictureRow, write_picture
from longtake.train.run_folder import VALIDATION

RESULTS = ("loss", "val/loss_ema", "val/psnr_ema")  # shown as numbers on top
MAIN_CURVES = ("loss", "val/loss", "val/psnr", "lr", "grad_norm", "samples_per_second")
MAX_SAMPLES = 24  # of a folder of plain samples; a page of hundreds of videos plays none of them
PICTURE_ROWS = 6
GAP = 8  # px between videos side by side
LEGEND = (
    "95 %: Wilson interval. Chance: right clips under captions of others. Blind (orange): clips "
    "right in all but this score, the level to beat. Ceiling (green): true clips through the "
    "codec. Normalised: (drawn − chance) / (ceiling − chance)."
)


@dataclass(frozen=True)
class ShownClip:
    """A prompt of an evaluation whose videos were kept: label → file."""

    group: str  # task · split · family
    prompt: str
    scores: dict[str, float]
    files: dict[str, Path]


@dataclass(frozen=True)
class Evaluation:
    """One folder that `longtake evaluate` wrote."""

    folder: Path
    card: Card
    clips: tuple[ShownClip, ...]


def write_report(
    run: Path,
    *,
    vae_run: Path | None = None,
    out: Path | None = None,
    picture: Path | None = None,
    scores: Sequence[Path] = (),
) -> list[Path]:
    """Write RUN/report.html and, where the run was evaluated, a PNG beside it. Returns the paths.

    `scores` are folders of `longtake evaluate` elsewhere than in RUN/evaluation. The page holds its
    videos, so it can be sent by mail. ValueError where `run` is no run folder.
    """
    config = load_config(run / "config.yaml")
    inside = sorted(path.parent for path in (run / "evaluation").glob("*/card.json"))
    evaluations, unreadable = [], []
    for folder in inside:
        try:
            evaluations.append(read_evaluation(folder))
        except ValueError as error:  # of an older version: the rest of the page stands without it
            unreadable.append(str(error))
    evaluations += [read_evaluation(folder) for folder in scores]
    sections = [("", facts(_facts(run, evaluations)))]
    sections += [("", note(text)) for text in unreadable]
    for evaluation in evaluations:
        sections += _evaluation_sections(evaluation)
    for title, cards in read_sample_folders(run / "samples"):
        sections.append((f"Samples · {title}", clip_grid(cards)))
    sections.append(("Curves", _curves(run)))
    for path in sorted((run / VALIDATION).glob("*.png"))[-1:]:
        card = ClipCard(path.stem, View(path.read_bytes(), "image/png"))
        sections.append(("Validation loss", clip_grid([card])))
    if vae_run is not None:
        sections.append((f"VAE · {vae_run.name}", _curves(vae_run)))
        for title, cards in read_sample_folders(vae_run / "samples"):
            sections.append((f"VAE reconstructions · {title}", clip_grid(cards)))
        sections.append(("", folded("VAE config.yaml", (vae_run / "config.yaml").read_text())))
    sections.append(("", folded("config.yaml", (run / "config.yaml").read_text())))
    out = out or run / "report.html"
    lead = f"stage {config.stage}, {config.train.steps} steps, made by longtake"
    _write(out, page(run.name, lead, sections).encode())
    paths = [out]
    rows = [row for evaluation in evaluations for row in picture_rows(evaluation.clips)]
    if rows:
        paths.append(picture or out.with_suffix(".png"))
        write_picture(rows[:PICTURE_ROWS], paths[-1])
    return paths


def read_evaluation(folder: Path) -> Evaluation:
    """What `longtake evaluate` wrote; ValueError where it did not."""
    if not (folder / "card.json").is_file():
        raise ValueError(f"{folder}: holds no card.json; give a folder of `longtake evaluate`")
    return Evaluation(folder, read_card(folder / "card.json"), tuple(_shown_clips(folder)))


def _shown_clips(folder: Path) -> list[ShownClip]:
    rows = read_rows(folder / ROWS) if (folder / ROWS).is_file() else []
    return [
        ShownClip(
            " · ".join((row.task, row.split, row.family)),
            row.prompt,
            row.drawn,
            {label: folder / name for label, name in row.files.items()},
        )
        for row in rows
        if row.files
    ]


def _evaluation_sections(evaluation: Evaluation) -> list[tuple[str, str]]:
    """A table for every kind of weights, task and split, the first one open, and the videos."""
    card = evaluation.card
    tables: dict[str, list[ScoreRow]] = {}
    for score in card.scores:
        row = ScoreRow(**{name: getattr(score, name) for name in ScoreRow.__dataclass_fields__})
        tables.setdefault(" · ".join((score.weights, score.task, score.split)), []).append(row)
    html = ""
    for title, rows in tables.items():
        table = score_table(rows)
        html += hidden(title, table) if html else f"<h3>{escape(title)}</h3>{table}"
    how = ", ".join(f"{key} {value}" for key, value in card.about.items() if key != "run")
    sections = [(f"Scores · {evaluation.folder.name}", html + note(LEGEND) + note(how))]
    groups: dict[str, list[ClipCard]] = {}
    for clip in evaluation.clips:
        card_of = ClipCard(clip.prompt, _side_by_side(clip.files), tuple(clip.files), clip.scores)
        groups.setdefault(clip.group, []).append(card_of)
    html = "".join(f"<h3>{group}</h3>{clip_grid(cards)}" for group, cards in groups.items())
    return [*sections, ("Drawn beside the truth", html)] if html else sections


def read_sample_folders(folder: Path) -> list[tuple[str, list[ClipCard]]]:
    """(title, cards) of `longtake sample` and of the last samples drawn during training."""
    found = []
    children = sorted(path for path in folder.glob("*") if path.is_dir())
    during = [path for path in children if path.name.startswith("step-")]
    for child in [*(path for path in children if path not in during), *during[-1:]]:
        prompts = _prompts(child)
        cards = [
            ClipCard(prompts.get(path.stem, path.stem), _view(path))
            for path in sorted(child.iterdir())[: 4 * MAX_SAMPLES]
            if path.suffix in (".mp4", ".png")
        ]
        if cards:
            found.append((child.name, cards[:MAX_SAMPLES]))
    return found


def _prompts(folder: Path) -> dict[str, str]:
    """File stem → prompt, from prompts.json (training) or a .json beside each file (command)."""
    prompts: dict[str, str] = {}
    for path in folder.glob("*.json"):
        tree = json.loads(path.read_text(encoding="utf-8"))
        prompts |= tree if path.name == "prompts.json" else {path.stem: tree["prompt"]}
    return prompts


def _view(path: Path) -> View:
    if path.suffix == ".png":
        return View(path.read_bytes(), "image/png")
    footage = read_footage_file(path)
    return View(viewing_mp4(footage.frames, footage.fps))


def _side_by_side(files: Mapping[str, Path]) -> View:
    """One video of several, so that they stay in step."""
    footage = [read_footage_file(path) for path in files.values()]
    parts = [enlarge(one.frames) for one in footage]
    frames, height = parts[0].shape[:2]
    gap = np.full((frames, height, GAP, 3), 255, np.uint8)
    joined = np.concatenate([x for part in parts for x in (gap, part)][1:], axis=2)
    return View(viewing_mp4(joined, footage[0].fps, 1))


def _facts(run: Path, evaluations: Sequence[Evaluation]) -> list[tuple[str, str]]:
    series = read_series(run)
    last = max(max(s.steps) for s in series.values())
    pairs = [(str(last), "steps")]
    for name in RESULTS:
        if name in series:
            first, final = series[name].values[0], series[name].values[-1]
            pairs.append((f"{final:.4g}", f"{name}, from {first:.4g}"))
    for evaluation in evaluations:
        mean = evaluation.card.mean
        text = "–" if mean is None else f"{mean:.3f}"
        pairs.append((text, f"card.mean, {evaluation.folder.name}"))
    return pairs


def _curves(run: Path) -> str:
    """The main charts, the others behind a click."""
    series = read_series(run)
    names = [name for name in series if not name.endswith("_ema") and not CELL.fullmatch(name)]
    charts = {name: svg(series[name], series.get(f"{name}_ema")) for name in names}
    main = [charts.pop(name) for name in MAIN_CURVES if name in charts]
    return curve_grid(main) + hidden("All other curves", curve_grid(list(charts.values())))


def picture_rows(clips: Sequence[ShownClip]) -> list[PictureRow]:
    """The first clips of each family: not the best, so the picture shows what a user gets."""
    groups = list(dict.fromkeys(clip.group for clip in clips))
    each = max(PICTURE_ROWS // max(len(groups), 1), 1)
    return [
        PictureRow(
            clip.prompt,
            read_footage_file(clip.files["drawn"]).frames,
            read_footage_file(clip.files["truth"]).frames,
        )
        for group in groups
        for clip in [clip for clip in clips if clip.group == group][:each]
    ]


def _write(path: Path, data: bytes) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_bytes(data)
    os.replace(scratch, path)
