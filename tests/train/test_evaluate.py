"""The card: means, intervals and normalisation are right, equal arguments give equal numbers."""

import json
from pathlib import Path

import pytest

from longtake.data.catalogue import build_catalogue
from longtake.train.card import (
    ClipScores,
    build_card,
    normalise,
    print_card,
    read_card,
    write_card,
)
from longtake.train.evaluate import EvaluateOptions, choose_rows, evaluate_run
from longtake.train.playback import read_footage_file

from .conftest import Road
from .small_runs import FAMILIES, write_dit_run, write_world

OPTIONS = EvaluateOptions(num_prompts=3, num_shown=1, batch_size=4)


def clip(family: str, drawn: float, ceiling: float = 1.0) -> ClipScores:
    names = {"move": "direction", "count": "count_constancy"}
    score = names[family]
    return ClipScores("k", family, "p", {score: drawn}, {score: ceiling}, {score: 1.0})


def test_means_and_normalisation() -> None:
    clips = [clip("move", value) for value in (1.0, 1.0, 1.0, 0.0)]
    card = build_card([*clips, clip("count", 0.4)], "val", {})
    direction = next(s for s in card.scores if s.name == "direction")
    assert direction.score == 0.75 and direction.num_clips == 4
    assert direction.low < 0.75 < direction.high
    assert direction.low == pytest.approx(0.3006, abs=1e-3)  # Wilson 1927, 3 of 4
    assert direction.normalised == pytest.approx((0.75 - 0.25) / 0.75)
    # Constancy does not ask anything of the prompt: other clips' captions meet it too.
    constancy = next(s for s in card.scores if s.name == "count_constancy")
    assert (constancy.chance, constancy.normalised) == (1.0, pytest.approx(0.4))
    assert card.mean == pytest.approx((2 / 3 + 0.4) / 2)


def test_no_room_is_no_number() -> None:
    assert normalise(0.2, 0.25, 0.3) is None
    assert normalise(0.0, 0.25, 1.0) == pytest.approx(-1 / 3)
    card = build_card([clip("move", 0.3, ceiling=0.3)], "val", {})
    assert card.mean is None and card.families[0].normalised is None
    with pytest.raises(ValueError, match="no clip"):
        build_card([], "val", {})


def test_card_survives_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = build_card([clip("move", 1.0), clip("count", 0.5)], "val", {"run": "r"})
    write_card(card, tmp_path / "card.json")
    assert read_card(tmp_path / "card.json") == card
    tree = json.loads((tmp_path / "card.json").read_text())
    assert {"val", "floor", "ceiling"} <= set(tree["families"]["move"])
    assert tree["card"]["mean"] == card.mean
    print_card(card)
    assert "direction" in capsys.readouterr().out
    (tmp_path / "card.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="schema 99"):
        read_card(tmp_path / "card.json")


def test_a_run_is_scored_alike_twice(road: Road, tmp_path: Path) -> None:
    first = evaluate_run(road.dit, road.val, OPTIONS, tmp_path / "a", device="cpu")
    second = evaluate_run(road.dit, road.val, OPTIONS, tmp_path / "b", device="cpu")
    assert first.card == second.card
    rows = [json.loads(x) for x in (first.folder / "clips.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and {row["family"] for row in rows} == set(FAMILIES)
    assert all(value >= 0.99 for row in rows for value in row["truth"].values())
    shown = [row for row in rows if row["files"]]
    assert len(shown) == 2
    for name in shown[0]["files"].values():
        assert read_footage_file(first.folder / name).frames.shape == (5, 16, 16, 3)
    other = evaluate_run(
        road.dit, road.val, EvaluateOptions(num_prompts=3, seed=7), tmp_path / "c", device="cpu"
    )
    assert other.card.about["seed"] == 7


def test_identity_has_truth_for_a_ceiling(road: Road, tmp_path: Path) -> None:
    sizes = ("codec=identity", "model.in_channels=3", "model.out_channels=3")
    run = write_dit_run(tmp_path / "dit", road.pixels, *sizes, "model.patch_size=[1,4,4]")
    result = evaluate_run(run, road.val, OPTIONS, device="cpu")
    assert result.folder == run / "evaluation" / "val-t2v-ema"
    for score in result.card.scores:
        assert score.ceiling == pytest.approx(score.truth)


def test_i2v_starts_from_the_true_frame(road: Road, tmp_path: Path) -> None:
    options = EvaluateOptions(num_prompts=1, num_shown=1, task="i2v")
    result = evaluate_run(road.dit, road.val, options, tmp_path / "i2v", device="cpu")
    row = json.loads((result.folder / "clips.jsonl").read_text().splitlines()[0])
    frames = {
        label: read_footage_file(result.folder / name).frames[0].astype(int)
        for label, name in row["files"].items()
    }
    assert abs(frames["drawn"] - frames["VAE"]).mean() < 4  # both are the frame through the VAE


def test_mistakes_are_named(road: Road, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="family candle"):
        evaluate_run(road.dit, road.val, EvaluateOptions(families=("candle",)), device="cpu")
    with pytest.raises(ValueError, match="split ood"):
        evaluate_run(road.dit, road.val, EvaluateOptions(split="ood"), device="cpu")
    with pytest.raises(ValueError, match="no such folder"):
        evaluate_run(road.dit, tmp_path / "absent", OPTIONS, device="cpu")
    with pytest.raises(ValueError, match="poetic"):
        options = EvaluateOptions(caption_kind="poetic")
        evaluate_run(road.dit, road.val, options, tmp_path / "x", device="cpu")
    assert not list(tmp_path.iterdir())


def test_two_splits_need_a_choice(tmp_path: Path) -> None:
    import shutil

    train = write_world(tmp_path / "all", num_clips=4)
    val = write_world(tmp_path / "val", split="val", num_clips=4)
    for index, shard in enumerate(sorted(val.glob("*.tar"))):
        shutil.copy(shard, train / f"val-{index}.tar")
    catalogue = build_catalogue(train, num_workers=1, progress=False)
    with pytest.raises(ValueError, match="choose --split"):
        choose_rows(catalogue, OPTIONS)
    rows = choose_rows(catalogue, EvaluateOptions(split="val", num_prompts=1))
    assert [row["split"] for row in rows] == ["val", "val"]
