"""`longtake report`: one HTML page of a run, and a picture of what it draws for a README."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longtake.train.card import Card, read_card
from longtake.train.config import load_config
from longtake.train.playback import enlarge, read_footage_file, viewing_mp4
from longtake.train.report_curves import read_series, svg
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

RESULTS = ("loss", "val/loss_ema", "val/psnr_ema")  # shown as numbers on top
MAIN_CURVES = ("loss", "val/loss", "val/psnr", "lr", "grad_norm", "samples_per_second")
MAX_SAMPLES = 24  # of a folder of plain samples; a page of hundreds of videos plays none of them
PICTURE_ROWS = 6
GAP = 8  # px between videos side by side
LEGEND = (
    "95 %: Wilson interval. Chance: right clips under captions of others. Blind (orange): clips "
    "right in all but this score, the level to beat. Ceiling (green): true clips through the VAE. "
    "Normalised: (drawn − chance) / (ceiling − chance)."
)


@dataclass(frozen=True)
class ShownClip:
    """A prompt of an evaluation whose videos were kept: label → file."""

    family: str
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
    evaluations = [read_evaluation(folder) for folder in (*inside, *scores)]
    sections = [("", facts(_facts(run, evaluations)))]
    for evaluation in evaluations:
        sections += _evaluation_sections(evaluation)
    for title, cards in read_sample_folders(run / "samples"):
        sections.append((f"Samples · {title}", clip_grid(cards)))
    sections.append(("Curves", _curves(run)))
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
    clips = []
    for line in (folder / "clips.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["files"]:
            files = {label: folder / name for label, name in row["files"].items()}
            clips.append(ShownClip(row["family"], row["prompt"], row["drawn"], files))
    return clips


def _evaluation_sections(evaluation: Evaluation) -> list[tuple[str, str]]:
    card = evaluation.card
    rows = [
        ScoreRow(**{name: getattr(score, name) for name in ScoreRow.__dataclass_fields__})
        for score in card.scores
    ]
    about = {**card.about, **card.about.get("sampler", {})}
    left_out = ("run", "world", "sampler")
    how = ", ".join(f"{key} {about[key]}" for key in about if key not in left_out)
    table = score_table(rows) + note(LEGEND) + note(how)
    sections = [(f"Scores · {evaluation.folder.name}", table)]
    by_family: dict[str, list[ClipCard]] = {}
    for clip in evaluation.clips:
        card_of = ClipCard(clip.prompt, _side_by_side(clip.files), tuple(clip.files), clip.scores)
        by_family.setdefault(clip.family, []).append(card_of)
    html = "".join(f"<h3>{family}</h3>{clip_grid(by_family[family])}" for family in by_family)
    return [*sections, (f"Drawn beside the truth · {card.split}", html)] if html else sections


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
    names = [name for name in series if not name.endswith("_ema")]
    charts = {name: svg(series[name], series.get(f"{name}_ema")) for name in names}
    main = [charts.pop(name) for name in MAIN_CURVES if name in charts]
    return curve_grid(main) + hidden("All other curves", curve_grid(list(charts.values())))


def picture_rows(clips: Sequence[ShownClip]) -> list[PictureRow]:
    """The first clips of each family: not the best, so the picture shows what a user gets."""
    families = list(dict.fromkeys(clip.family for clip in clips))
    each = max(PICTURE_ROWS // max(len(families), 1), 1)
    return [
        PictureRow(
            clip.prompt,
            read_footage_file(clip.files["drawn"]).frames,
            read_footage_file(clip.files["truth"]).frames,
        )
        for family in families
        for clip in [clip for clip in clips if clip.family == family][:each]
    ]


def _write(path: Path, data: bytes) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_bytes(data)
    os.replace(scratch, path)
