"""The score card: what was drawn beside chance, truth and the ceiling of the codec."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longtake.train.run_folder import write_json

SCHEMA = 3
# Below this distance between ceiling and chance a normalised score would be noise divided by noise.
MIN_ROOM = 0.1
GATES = ("val", "combo", "videos")  # splits whose families make `card.mean`
PAIR_FLIP, GIVEN_KEPT, CONTINUATION = "pair_flip", "given_kept", "continuation"
DRIFT = "drift@"  # and the length in trained lengths: drift@2x


@dataclass(frozen=True)
class ClipScores:
    """One video: scores of what was drawn, of the true clip through the codec, and of that clip.

    Each maps score names to [0, 1]. `ceiling` and `truth` are empty where no true clip is known.
    """

    weights: str  # ema | raw; the program's name for videos from elsewhere
    task: str
    split: str
    family: str
    key: str
    prompt: str
    drawn: dict[str, float]
    ceiling: dict[str, float]
    truth: dict[str, float]
    chance: dict[str, float]
    blind: dict[str, float]
    files: dict[str, str] = field(default_factory=dict)  # what it shows -> path in the folder
    position_error: float | None = None  # px from the true continuation, where frames tell it


@dataclass(frozen=True)
class Score:
    """Mean of one score over the clips of one family."""

    weights: str
    task: str
    split: str
    family: str
    name: str
    num_clips: int
    score: float
    low: float  # Wilson 95 %
    high: float
    chance: float  # of true clips with the captions of other clips
    blind: float  # of clips that are right in all but this: the level to beat
    ceiling: float | None
    truth: float | None
    normalised: float | None  # (score − chance) / (ceiling − chance); None without room between
    position_error: float | None = None  # of `continuation`: mean distance from the truth in px

    @property
    def is_of_prompt(self) -> bool:
        """Whether it belongs to the family's mean: drift, minimal pairs, given frames and what any
        caption of the family is met by (chance 1) stand beside it."""
        is_beside = self.name in (PAIR_FLIP, GIVEN_KEPT) or self.name.startswith(DRIFT)
        return not is_beside and self.chance < 1


@dataclass(frozen=True)
class FamilyScore:
    """Means over the prompt scores of one family, task, split and kind of weights."""

    weights: str
    task: str
    split: str
    family: str
    score: float
    floor: float
    ceiling: float | None
    truth: float | None
    normalised: float | None


@dataclass(frozen=True)
class Card:
    """`mean` is the one number that sweeps optimise: the mean of the normalised family scores of
    the weights that were asked for first (EMA by default) over all tasks, on the splits that
    gate (val and combo; videos from elsewhere). `left_out` counts what could not be scored."""

    about: dict[str, Any]  # run, step, seed, sampler
    scores: tuple[Score, ...]
    families: tuple[FamilyScore, ...]
    mean: float | None
    left_out: dict[str, int] = field(default_factory=dict)  # what to know of them -> clips


def build_card(
    clips: Sequence[ClipScores], about: Mapping[str, Any], left_out: Mapping[str, int] | None = None
) -> Card:
    """Means, intervals and normalisation, in the order in which the clips' groups first occur.

    ValueError without a clip.
    """
    if not clips:
        raise ValueError("no clip was scored, so there is no card")
    groups: dict[tuple[str, str, str, str], list[ClipScores]] = {}
    for clip in clips:
        groups.setdefault((clip.weights, clip.task, clip.split, clip.family), []).append(clip)
    scores, families = [], []
    for group, mine in groups.items():
        names = sorted({name for clip in mine for name in clip.drawn})
        found = [
            _score(group, name, [clip for clip in mine if name in clip.drawn]) for name in names
        ]
        scores += found
        if prompt_scores := [score for score in found if score.is_of_prompt]:
            families.append(_family(group, prompt_scores))
    main = clips[0].weights
    gating = [
        family.normalised
        for family in families
        if family.weights == main and family.split in GATES and family.normalised is not None
    ]
    mean = fmean(gating) if gating else None
    return Card(dict(about), tuple(scores), tuple(families), mean, dict(left_out or {}))


def _score(group: tuple[str, str, str, str], name: str, clips: Sequence[ClipScores]) -> Score:
    drawn = fmean(clip.drawn[name] for clip in clips)
    ceiling = _mean(clip.ceiling.get(name) for clip in clips)
    chance = fmean(clip.chance[name] for clip in clips)
    low, high = wilson(drawn, len(clips))
    return Score(
        *group,
        name=name,
        num_clips=len(clips),
        score=drawn,
        low=low,
        high=high,
        chance=chance,
        blind=fmean(clip.blind[name] for clip in clips),
        ceiling=ceiling,
        truth=_mean(clip.truth.get(name) for clip in clips),
        normalised=normalise(drawn, chance, 1.0 if ceiling is None else ceiling),
        position_error=_mean(c.position_error for c in clips) if name == CONTINUATION else None,
    )


def _family(group: tuple[str, str, str, str], scores: Sequence[Score]) -> FamilyScore:
    return FamilyScore(
        *group,
        score=fmean(score.score for score in scores),
        floor=fmean(score.chance for score in scores),
        ceiling=_mean(score.ceiling for score in scores),
        truth=_mean(score.truth for score in scores),
        normalised=_mean(score.normalised for score in scores),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def normalise(score: float, floor: float, ceiling: float) -> float | None:
    """(score − floor) / (ceiling − floor); below chance is negative, and None without room."""
    room = ceiling - floor
    return (score - floor) / room if room >= MIN_ROOM and math.isfinite(room) else None


def wilson(mean: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion from n trials (Wilson 1927), 95 % by default."""
    if n < 1:
        raise ValueError(f"n={n} must be at least 1: an interval needs a trial")
    middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def write_card(card: Card, path: Path) -> None:
    """Write card.json atomically.

    `families` is WORLD.md's {family: {val, combo, ood, ceiling, floor}}, for the first weights and
    the first task; `by_family` and `scores` hold everything.
    """
    first = card.families[0] if card.families else None
    families: dict[str, dict[str, float | None]] = {}
    for row in card.families:
        if first and (row.weights, row.task) == (first.weights, first.task):
            entry = families.setdefault(row.family, {})
            entry[row.split] = row.score
            for name in ("floor", "ceiling", "truth", "normalised"):
                entry.setdefault(name, getattr(row, name))
    tree = {
        "schema": SCHEMA,
        "card": {"mean": card.mean},
        "families": families,
        "by_family": [asdict(family) for family in card.families],
        "scores": [asdict(score) for score in card.scores],
        "left_out": card.left_out,
        "about": card.about,
    }
    write_json(path, tree)


def read_card(path: Path) -> Card:
    """What `write_card` wrote; ValueError for another schema or a damaged file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["schema"] != SCHEMA:
            raise ValueError(f"schema {tree['schema']}, this version reads {SCHEMA}")
        scores = tuple(Score(**score) for score in tree["scores"])
        families = tuple(FamilyScore(**family) for family in tree["by_family"])
        return Card(tree["about"], scores, families, tree["card"]["mean"], tree["left_out"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a score card ({error}); evaluate the run again") from error


SCORES = pa.map_(pa.string(), pa.float64())
ROWS = pa.schema(
    [
        *((name, pa.string()) for name in ("weights", "task", "split", "family", "key", "prompt")),
        *((name, SCORES) for name in ("drawn", "ceiling", "truth", "chance", "blind")),
        ("files", pa.map_(pa.string(), pa.string())),
        ("position_error", pa.float64()),
    ]
)


def write_rows(clips: Sequence[ClipScores], path: Path) -> None:
    """One Parquet row per clip; scores are maps from name to value."""
    rows = [
        {k: list(v.items()) if isinstance(v, dict) else v for k, v in asdict(clip).items()}
        for clip in clips
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=ROWS), path)


def read_rows(path: Path) -> list[ClipScores]:
    """What `write_rows` wrote."""
    clips = []
    for row in pq.read_table(path, schema=ROWS).to_pylist():
        fields: dict[str, Any] = {k: dict(v) if isinstance(v, list) else v for k, v in row.items()}
        clips.append(ClipScores(**fields))
    return clips


def card_row(card: Card) -> dict[str, float]:
    """A card as a row of metrics: `card.mean`, the scores of the first weights by task, split,
    family and name, and how many clips of a family they rest on."""
    mine = [score for score in card.scores if score.weights == card.scores[0].weights]
    row = {f"eval/{s.task}/{s.split}/{s.family}/{s.name}": s.score for s in mine}
    row["eval/clips"] = float(max(score.num_clips for score in mine))
    return row if card.mean is None else {"card.mean": card.mean, **row}


def print_card(card: Card, console: Console | None = None) -> None:
    """The table a person reads; 79 columns wide, for a narrow terminal and a log file."""
    console = console or Console()
    groups: dict[tuple[str, str, str], list[Score]] = {}
    for score in card.scores:
        groups.setdefault((score.weights, score.task, score.split), []).append(score)
    for group, scores in groups.items():
        title = " · ".join((str(card.about.get("run", "")), *group))
        console.print(_table(escape(title), scores))
        if off := [s for s in scores if s.position_error is not None]:
            errors = ", ".join(f"{s.family} {s.position_error:.2f}" for s in off)
            console.print(f"px from the true continuation: {errors}", soft_wrap=True)
    mean = "–" if card.mean is None else f"{card.mean:.3f}"
    counted = [row for row in card.families if row.split in GATES and row.normalised is None]
    if counted:
        names = ", ".join(sorted({row.family for row in counted}))
        console.print(f"not in card.mean, too little room above chance: {names}", style="yellow")
    console.print(f"card.mean {mean}   (0: chance, 1: all that the codec lets through)")
    for line in (
        "chance: right clips under the captions of others; blind: right in all but this",
        "ceiling: true clips through the codec; norm.: (drawn - chance) / (ceiling - chance)",
    ):
        console.print(line, style="dim", soft_wrap=True)
    for reason, count in card.left_out.items():
        console.print(f"{count} · {escape(reason)}", style="yellow", soft_wrap=True)


def _table(title: str, scores: Sequence[Score]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("family", "score"):
        table.add_column(name, no_wrap=True)
    for name in ("n", "drawn", "95 %", "chance", "blind", "ceiling", "truth", "norm."):
        table.add_column(name, justify="right", no_wrap=True)

    def text(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    previous = ""
    for score in scores:
        if previous and score.family != previous:
            table.add_row()
        table.add_row(
            "" if score.family == previous else score.family,
            score.name,
            str(score.num_clips),
            f"[bold]{score.score:.2f}",
            f"{score.low:.2f}–{score.high:.2f}",
            text(score.chance),
            text(score.blind),
            text(score.ceiling),
            text(score.truth),
            text(score.normalised),
        )
        previous = score.family
    return table
