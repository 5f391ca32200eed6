"""The card: means, intervals, normalisation, and what survives the file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from longtake.data.world import make_clip, score_frames
from longtake.train.card import (
    ClipScores,
    build_card,
    normalise,
    print_card,
    read_card,
    read_rows,
    wilson,
    write_card,
    write_rows,
)

CHANCE = {"direction": 0.25, "count_constancy": 1.0, "pair_flip": 0.0}


def clip(family: str, drawn: float, ceiling: float | None = 1.0, **changes: object) -> ClipScores:
    name = {"move": "direction", "count": "count_constancy"}[family]
    known = {} if ceiling is None else {name: ceiling}
    level = {name: CHANCE[name]}
    row = ClipScores(
        *("ema", "t2v", "val", family, "val-00000000", "p", {name: drawn}, known, {name: 1.0}),
        chance=level,
        blind=level,
    )
    return replace(row, **changes)  # pyright: ignore[reportArgumentType]


def test_means_and_normalisation() -> None:
    clips = [clip("move", value) for value in (1.0, 1.0, 1.0, 0.0)]
    card = build_card([*clips, clip("count", 0.4)], {})
    direction = next(s for s in card.scores if s.name == "direction")
    assert direction.score == 0.75 and direction.num_clips == 4
    assert direction.low < 0.75 < direction.high
    assert direction.low == pytest.approx(0.3006, abs=1e-3)  # Wilson 1927, 3 of 4
    assert direction.normalised == pytest.approx((0.75 - 0.25) / 0.75)
    # Constancy does not ask anything of the prompt: other clips' captions meet it too.
    constancy = next(s for s in card.scores if s.name == "count_constancy")
    assert (constancy.score, constancy.chance, constancy.normalised) == (0.4, 1.0, None)
    assert card.mean == pytest.approx(2 / 3)


def test_other_clips_captions_are_worth_nothing() -> None:
    """card.mean of true clips under the captions of others: 0 is chance."""
    rows = []
    for family in ("move", "count", "leftright", "collide"):
        made = [make_clip(1, "val", i, families=[family]) for i in range(96)]
        for clip, other in zip(made, [*made[1:], made[0]], strict=True):
            reading = other.reading("short")
            drawn = score_frames(clip.frames, reading.expect)
            levels = reading.levels(other.description.canvas)
            chance = {name: levels[name][0] for name in drawn}
            ones = dict.fromkeys(drawn, 1.0)
            place = ("ema", "t2v", "val", family, clip.key, other.captions["short"])
            rows.append(ClipScores(*place, drawn, ones, ones, chance, chance))
    mean = build_card(rows, {}).mean
    assert mean is not None and abs(mean) < 0.06


def test_the_mean_is_of_the_first_weights_on_the_splits_that_gate() -> None:
    good, bad = clip("move", 1.0), clip("move", 0.0)
    others = [replace(bad, weights="raw"), replace(bad, split="ood")]
    assert build_card([good, *others], {}).mean == 1.0
    assert build_card([good, replace(bad, split="combo")], {}).mean == pytest.approx(1 / 3)
    # Pairs and drift are told beside the family, not in its mean.
    pair = replace(good, drawn={"direction": 1.0, "pair_flip": 0.0}, chance=CHANCE, blind=CHANCE)
    card = build_card([pair], {})
    assert card.mean == 1.0 and {s.name for s in card.scores} == {"direction", "pair_flip"}


def test_no_room_is_no_number() -> None:
    assert normalise(0.2, 0.25, 0.3) is None
    assert normalise(0.0, 0.25, 1.0) == pytest.approx(-1 / 3)
    card = build_card([clip("move", 0.3, ceiling=0.3)], {})
    assert card.mean is None and card.families[0].normalised is None
    print_card(card)  # says which family does not count
    unknown = build_card([clip("move", 0.625, ceiling=None)], {})
    assert unknown.scores[0].ceiling is None and unknown.mean == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no clip"):
        build_card([], {})


def test_card_and_rows_survive_their_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = [clip("move", 1.0, files={"drawn": "videos/a.mp4"}), clip("count", 0.5)]
    card = build_card(clips, {"run": "r"}, {"damaged": 2})
    write_card(card, tmp_path / "card.json")
    assert read_card(tmp_path / "card.json") == card
    tree = json.loads((tmp_path / "card.json").read_text())
    assert {"val", "floor", "ceiling"} <= set(tree["families"]["move"])
    assert tree["card"]["mean"] == card.mean
    write_rows(clips, tmp_path / "clips.parquet")
    assert read_rows(tmp_path / "clips.parquet") == clips
    print_card(card)
    output = capsys.readouterr().out
    assert "direction" in output and "2 · damaged" in output
    assert max(len(line) for line in output.splitlines() if "damaged" not in line) <= 88
    (tmp_path / "card.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="schema 99"):
        read_card(tmp_path / "card.json")


def test_wilson_interval() -> None:
    low, high = wilson(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-3)
    assert wilson(1.0, 256)[0] == pytest.approx(0.985, abs=1e-3)
    assert wilson(0.0, 10)[0] == 0.0
    with pytest.raises(ValueError, match="n=0"):
        wilson(0.5, 0)
