"""The score card of a run: what it drew beside chance, truth and the ceiling of its VAE."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from longtake.data.world.families import FAMILIES
from longtake.data.world.scorers import chance_of, wilson

SCHEMA = 1
# Below this distance between ceiling and chance a normalised score would be noise divided by noise.
MIN_ROOM = 0.1


@dataclass(frozen=True)
class ClipScores:
    """One prompt: what was drawn, what the VAE made of the true clip, and the true clip itself.

    Each maps score names to [0, 1]; the names are those that the family defines.
    """

    key: str
    family: str
    prompt: str
    drawn: dict[str, float]
    ceiling: dict[str, float]
    truth: dict[str, float]


@dataclass(frozen=True)
class Score:
    """Mean of one score over the clips of one family."""

    family: str
    name: str
    num_clips: int
    score: float
    low: float  # Wilson 95 %
    high: float
    chance: float  # of true clips with the captions of other clips
    blind: float  # of clips that are right in all but this: the level to beat
    ceiling: float
    truth: float
    normalised: float | None  # (score − chance) / (ceiling − chance); None without room between


@dataclass(frozen=True)
class FamilyScore:
    """Means over the scores of one family; floor is chance, 0 where chance is 1."""

    family: str
    score: float
    floor: float
    ceiling: float
    truth: float
    normalised: float | None


@dataclass(frozen=True)
class Card:
    """`mean` is the mean of the families' normalised scores: the one number sweeps optimise."""

    split: str
    about: dict[str, Any]  # run, step, weights, task, seed, sampler
    scores: tuple[Score, ...]
    families: tuple[FamilyScore, ...]
    mean: float | None


def build_card(clips: Sequence[ClipScores], split: str, about: dict[str, Any]) -> Card:
    """Means, intervals and normalisation; families and scores in alphabetical order."""
    if not clips:
        raise ValueError("no clip was scored: the world shards hold none of the asked families")
    scores = []
    for family in sorted({clip.family for clip in clips}):
        mine = [clip for clip in clips if clip.family == family]
        for name in sorted({name for clip in mine for name in clip.truth}):
            scores.append(_score(family, name, [clip for clip in mine if name in clip.truth]))
    families = tuple(
        _family(name, [score for score in scores if score.family == name])
        for name in sorted({score.family for score in scores})
    )
    normalised = [family.normalised for family in families if family.normalised is not None]
    mean = fmean(normalised) if normalised else None
    return Card(split, about, tuple(scores), families, mean)


def _score(family: str, name: str, clips: Sequence[ClipScores]) -> Score:
    drawn = fmean(clip.drawn[name] for clip in clips)
    ceiling = fmean(clip.ceiling[name] for clip in clips)
    low, high = wilson(drawn, len(clips))
    chance = chance_of(family, name)
    # A score that other clips' captions meet as well asks nothing of the prompt: its floor is 0.
    floor = 0.0 if chance >= 1 else chance
    return Score(
        family=family,
        name=name,
        num_clips=len(clips),
        score=drawn,
        low=low,
        high=high,
        chance=chance,
        blind=FAMILIES[family].blind[name],
        ceiling=ceiling,
        truth=fmean(clip.truth[name] for clip in clips),
        normalised=normalise(drawn, floor, ceiling),
    )


def _family(name: str, scores: Sequence[Score]) -> FamilyScore:
    normalised = [score.normalised for score in scores if score.normalised is not None]
    return FamilyScore(
        family=name,
        score=fmean(score.score for score in scores),
        floor=fmean(0.0 if score.chance >= 1 else score.chance for score in scores),
        ceiling=fmean(score.ceiling for score in scores),
        truth=fmean(score.truth for score in scores),
        normalised=fmean(normalised) if normalised else None,
    )


def normalise(score: float, floor: float, ceiling: float) -> float | None:
    """(score − floor) / (ceiling − floor); below chance is negative, and None without room."""
    room = ceiling - floor
    return (score - floor) / room if room >= MIN_ROOM and math.isfinite(room) else None


def write_card(card: Card, path: Path) -> None:
    """Write card.json atomically; `families` is WORLD.md's {family: {split, ceiling, floor}}."""
    families = {
        family.family: {
            card.split: family.score,
            "floor": family.floor,
            "ceiling": family.ceiling,
            "truth": family.truth,
            "normalised": family.normalised,
        }
        for family in card.families
    }
    tree = {
        "schema": SCHEMA,
        "card": {"mean": card.mean},
        "split": card.split,
        "families": families,
        "scores": [asdict(score) for score in card.scores],
        "about": card.about,
    }
    scratch = path.with_suffix(".json.tmp")
    scratch.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def read_card(path: Path) -> Card:
    """What `write_card` wrote; ValueError for another schema or a damaged file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["schema"] != SCHEMA:
            raise ValueError(f"schema {tree['schema']}, this version reads {SCHEMA}")
        scores = tuple(Score(**score) for score in tree["scores"])
        families = tuple(
            FamilyScore(
                name,
                values[tree["split"]],
                *(values[key] for key in ("floor", "ceiling", "truth", "normalised")),
            )
            for name, values in tree["families"].items()
        )
        return Card(tree["split"], tree["about"], scores, families, tree["card"]["mean"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a score card ({error}); evaluate the run again") from error


def print_card(card: Card, console: Console | None = None) -> None:
    """The table a person reads."""
    # 79 columns wide: it must survive a narrow terminal and a log file.
    title = f"{card.about.get('run', '')} · {card.split}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("family", "score"):
        table.add_column(name, no_wrap=True)
    for name in ("n", "drawn", "95 %", "chance", "blind", "ceiling", "truth", "norm."):
        table.add_column(name, justify="right", no_wrap=True)
    previous = ""
    for score in card.scores:
        if previous and score.family != previous:
            table.add_row()
        table.add_row(
            "" if score.family == previous else score.family,
            score.name,
            str(score.num_clips),
            f"[bold]{score.score:.2f}",
            f"{score.low:.2f}–{score.high:.2f}",
            f"{score.chance:.2f}",
            f"{score.blind:.2f}",
            f"{score.ceiling:.2f}",
            f"{score.truth:.2f}",
            "–" if score.normalised is None else f"{score.normalised:.2f}",
        )
        previous = score.family
    console = console or Console()
    console.print(table)
    mean = "–" if card.mean is None else f"{card.mean:.3f}"
    console.print(f"card.mean {mean}   (0: chance, 1: all that the VAE lets through)")
    for line in (
        "chance: right clips under the captions of others; blind: right in all but this",
        "ceiling: true clips through the VAE; norm.: (drawn - chance) / (ceiling - chance)",
    ):
        console.print(line, style="dim", soft_wrap=True)
