"""Evaluating a run: what is asked, equal numbers for equal arguments, ceilings, mistakes."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest

from longtake.data.world import FAMILIES as WORLD
from longtake.data.world import make_clip, make_pair
from longtake.data.world.given import continuation, given_kept, position_error, score_given
from longtake.models.conditioning import GIVES_NOTHING, TASKS
from longtake.train.card import read_rows
from longtake.train.evaluate import EvaluateOptions, evaluate_run, resolve
from longtake.train.playback import read_footage_file
from longtake.train.ranks import Ranks
from longtake.train.runs import find_run, read_run_config
from longtake.train.world_prompts import Prompt, PromptSet, batches, pair_flip, prompts, score

from .conftest import Road
from .forked import run_ranks
from .small_runs import FAMILIES, write_dit_run

OPTIONS = EvaluateOptions(
    splits=("val",), num_prompts=3, num_pairs=0, num_shown=1, batch_size=4, weights=("ema",)
)
WANTED = PromptSet(FAMILIES, ("val", "ood"), 3, (5, 16, 16), 8.0, num_pairs=2, drift=3)


def test_a_pair_flips_in_what_the_word_asks() -> None:
    """Colour by `colour`, not by what it says of the looks or of where the colours are."""
    asks = {
        "colour": ("colour", "colour2"),
        "relation": ("colour", "colour2", "relation"),
        "looks": ("colour", "shape", "colour2", "shape2"),
        "consistency": (),
    }
    right, rough = dict.fromkeys(asks, 1.0), dict.fromkeys(asks, 0.0) | {"colour": 1.0}
    for slot, found in (("colour", 1.0), ("relation", 0.0), ("shape2", 0.0)):
        assert pair_flip(rough, rough, asks, slot) == found  # wrong in both is as it was
    assert pair_flip(right, right, asks, "shape2") == 1.0
    assert pair_flip(right, right | {"consistency": 0.0}, asks, "colour") == 1.0
    for name in ("colour", "relation", "looks"):
        assert pair_flip(right, right | {name: 0.0}, asks, "colour") == 0.0


@pytest.mark.parametrize("family", WORLD)
def test_true_pairs_flip_and_one_clip_twice_does_not(family: str) -> None:
    side, frames = max(32, WORLD[family].min_side), max(9, WORLD[family].min_frames)
    shape = {"frames": frames, "height": side, "width": side}
    for kind, index in product(("short", "dense", "zh"), range(3)):
        clip, twin = make_pair(3, "val", index, families=[family], **shape)
        same = replace(twin, frames=clip.frames)
        for other, found in ((twin, 1.0), (same, 0.0)):
            scores = score(Prompt(clip, twin), [clip.frames, other.frames], kind, [])
            assert scores["pair_flip"] == found, clip.captions[kind]


def test_prompts_are_a_fixed_list_that_ranks_share() -> None:
    every = list(prompts(WANTED, "t2v", 4))
    names = [(p.clip.split, p.clip.family, p.clip.key, p.factor, p.twin is not None) for p in every]
    assert len(set(names)) == len(names) == 2 * 3 * 2 + 2 * 3 * 2
    shared = [list(prompts(WANTED, "t2v", 4, rank, 2)) for rank in range(2)]
    mixed = [p for pair in zip(*shared, strict=True) for p in pair]
    assert [p.clip.key for p in mixed] == [p.clip.key for p in every]
    assert sum(p.twin is not None for p in every) == 2 * len(FAMILIES)
    assert {len(p.clip.frames) for p in every} == {5, 9, 13}
    assert not any(p.twin or p.factor > 1 for p in prompts(WANTED, "i2v", 4))
    sizes = {sum(len(p.clips) for p in batch) for batch in batches(every, 4)}
    assert max(sizes) <= 4
    assert all(len({p.clip.frames.shape for p in b}) == 1 for b in batches(every, 4))


def test_truth_scores_one_and_a_wrong_twin_flips_nothing() -> None:
    for prompt in prompts(WANTED, "t2v", 4):
        true = [clip.frames for clip in prompt.clips]
        assert set(score(prompt, true, "short", []).values()) == {1.0}
        if prompt.twin is not None:
            same = score(prompt, [true[0], true[0]], "short", [])
            assert same["pair_flip"] == 0.0 and len(same) > 1
        if prompt.factor > 1:
            gone = true[0].copy()
            gone[-5:] = 150
            (kept,) = score(prompt, [gone], "short", []).values()
            assert kept == 0.0


def test_what_is_given_must_be_kept_and_go_on_as_in_truth() -> None:
    clips = [make_clip(3, "val", i, families=["move"], frames=17) for i in range(24)]
    given = [0, 1, 2, 3, 4]
    rng = np.random.default_rng(0)
    for clip, other in pairwise(clips):
        true = clip.frames
        noisy = (true + rng.normal(0, 8, true.shape)).round().clip(0, 255).astype(np.uint8)
        late = np.concatenate([true[:1], true[:-1]])
        for frames in (true, noisy, late):
            assert score_given(frames, true, given) == {"given_kept": 1.0, "continuation": 1.0}
        assert score_given(other.frames, true, [0]) == {"given_kept": 0.0}
        elsewhere = np.concatenate([true[:5], np.roll(true[5:], 16, axis=2)])
        assert given_kept(elsewhere, true, given) == 1.0
        assert continuation(elsewhere, true, given) == 0.0
        assert position_error(elsewhere, true, given) > 5
        assert position_error(true, true, given) == 0.0
        empty = np.concatenate([true[:5], np.full_like(true[5:], 150)])
        assert continuation(empty, true, given) == 0.0
        assert position_error(empty, true, given) == min(true.shape[1:3])
    assert score_given(clips[0].frames, clips[0].frames, []) == {}


def test_a_run_is_scored_alike_twice(road: Road, tmp_path: Path) -> None:
    options = replace(OPTIONS, num_pairs=1, splits=("val", "ood"), drift=2, weights=("ema", "raw"))
    first = evaluate_run(road.dit, options, tmp_path / "a")
    second = evaluate_run(road.dit, options, tmp_path / "b")
    assert first.card == second.card
    assert {(s.weights, s.split) for s in first.card.scores} == {
        (w, s) for w in ("ema", "raw") for s in ("val", "ood")
    }
    assert {"pair_flip", "drift@1x", "drift@2x", "given_kept"} <= {
        s.name for s in first.card.scores
    }
    assert {s.task for s in first.card.scores} == {"t2v", "i2v"}  # what the run was trained on
    rows = read_rows(first.folder / "clips.parquet")
    assert {row.family for row in rows} == set(FAMILIES)
    assert all(value == 1 for row in rows for value in row.truth.values())
    assert all(row.truth.keys() == row.drawn.keys() == row.ceiling.keys() for row in rows)
    shown = [row for row in rows if row.files]
    assert {row.weights for row in shown} == {"ema"}
    for name in shown[0].files.values():
        assert read_footage_file(first.folder / name).frames.shape == (5, 16, 16, 3)
    other = evaluate_run(road.dit, replace(OPTIONS, seed=7), tmp_path / "c")
    assert other.card.about["prompts"]["seed"] == 7
    assert json.loads((other.folder / "card.json").read_text())["families"]["move"]["val"] >= 0


def evaluate_on(ranks: Ranks, run: str, options: EvaluateOptions, out: str) -> None:
    evaluate_run(Path(run), options, Path(out), ranks=ranks)


@pytest.mark.dist
def test_two_ranks_score_what_one_does(road: Road, tmp_path: Path) -> None:
    options = replace(OPTIONS, num_pairs=2, num_prompts=4)
    alone = evaluate_run(road.dit, options, tmp_path / "alone")
    run_ranks(2, evaluate_on, str(road.dit), options, str(tmp_path / "two"))
    rows = [read_rows(tmp_path / name / "clips.parquet") for name in ("alone", "two")]
    assert rows[0] == rows[1] and len(rows[0]) == alone.card.scores[0].num_clips * 2 * 2
    assert not list(tmp_path.glob("*.tmp*"))


def test_identity_has_truth_for_a_ceiling(road: Road, tmp_path: Path) -> None:
    sizes = ("codec=identity", "model.in_channels=3", "model.out_channels=3")
    run = write_dit_run(tmp_path / "dit", road.pixels, *sizes, "model.patch_size=[1,4,4]")
    result = evaluate_run(run, OPTIONS)
    assert result.folder == run / "evaluation" / "world"
    for entry in result.card.scores:
        assert entry.ceiling == pytest.approx(entry.truth)


def test_every_task_is_drawn_from_its_frames_and_scored(road: Road, tmp_path: Path) -> None:
    sizes = ("codec=identity", "model.in_channels=3", "model.out_channels=3")
    every = f"tasks={{{', '.join(f'{name}: 1' for name in TASKS)}}}"
    sides = "height:16,width:16,batch_size:2"
    bucket = f"data.buckets=[{{frames:5,{sides}}}, {{frames:1,{sides}}}]"
    run = write_dit_run(
        *(tmp_path / "dit", road.pixels, *sizes, "model.patch_size=[1,4,4]", every, bucket)
    )
    options = replace(OPTIONS, num_prompts=2, num_shown=0, steps=2, solver="unipc")
    card = evaluate_run(run, options).card
    assert {score.task for score in card.scores} == set(TASKS)
    by_name = {(s.task, s.family, s.name): s for s in card.scores}
    for task in TASKS.keys() - GIVES_NOTHING:
        assert by_name[task, "move", "given_kept"].score == 1.0
        assert ((task, "move", "continuation") in by_name) == (task != "i2v")
    errors = {s.position_error for s in card.scores if s.name == "continuation"}
    assert all(error is not None and 0 < error <= 16 for error in errors)
    assert "direction" not in {s.name for s in card.scores if s.task == "t2i"}


def test_i2v_starts_from_the_true_frame(road: Road, tmp_path: Path) -> None:
    result = evaluate_run(road.dit, replace(OPTIONS, tasks=("i2v",)), tmp_path / "i2v")
    row = next(row for row in read_rows(result.folder / "clips.parquet") if row.files)
    frames = {
        label: read_footage_file(result.folder / name).frames[0].astype(int)
        for label, name in row.files.items()
    }
    assert abs(frames["drawn"] - frames["VAE"]).mean() < 4  # both are the frame through the VAE
    assert row.drawn["given_kept"] == row.ceiling["given_kept"]


def test_the_run_says_what_is_asked_by_default(road: Road) -> None:
    config = read_run_config(find_run(road.dit))
    wanted = resolve(config, EvaluateOptions(), 2)  # pyright: ignore[reportArgumentType]
    assert list(wanted) == ["t2v", "i2v"] and wanted["i2v"] == wanted["t2v"]
    one = wanted["t2v"]
    assert one.families == tuple(sorted(FAMILIES)) and one.shape == (5, 16, 16)
    assert one.kind == "short"


def test_each_task_is_asked_at_a_shape_that_fits_it(road: Road, tmp_path: Path) -> None:
    """The longest, whatever bucket comes first: a join needs five latent frames, i2v two."""
    sizes = ("codec=identity", "model.in_channels=3", "model.out_channels=3")
    buckets = ", ".join(f"{{frames:{n},height:16,width:16,batch_size:2}}" for n in (1, 3, 5))
    run = write_dit_run(
        *(tmp_path / "dit", road.pixels, *sizes, "model.patch_size=[1,4,4]"),
        *(f"data.buckets=[{buckets}]", "tasks={t2v: 1, t2i: 1, i2v: 1, join: 1}"),
    )
    few = replace(OPTIONS, num_prompts=1, num_shown=0, steps=1)
    card = evaluate_run(run, few, tmp_path / "out").card
    long = dict.fromkeys(("t2v", "i2v", "join"), (5, 16, 16))
    assert card.about["shapes"] == {**long, "t2i": (1, 16, 16)}
    assert {score.task for score in card.scores} == {"t2v", "t2i", "i2v", "join"}
    with pytest.raises(ValueError, match="frames=3: task join: it needs 5 latent frames"):
        evaluate_run(run, replace(few, frames=3), tmp_path / "none")
    short = write_dit_run(tmp_path / "short", road.latents, "tasks={t2v: 1, i2v: 0, join: 1}")
    with pytest.raises(ValueError, match=r"none is fit for join: .*needs 5.* has 3 \(5x16x16\)"):
        evaluate_run(short, few, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"families": ("candel",)}, "candel.* is unknown"),
        ({"splits": ("test",)}, "split='test' must be one of"),
        ({"caption_kind": "poetic"}, "poetic.*dense"),
        ({"caption_kind": "vague"}, "captions vague"),
        ({"weights": ("ema", "best")}, "weights=best"),
        ({"tasks": ("join",)}, "task join"),
        ({"num_prompts": 0}, "prompts=0"),
        ({"families": ("occlusion",), "frames": 1}, "occlusion .frames >= 8"),
    ],
)
def test_mistakes_are_named(road: Road, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_run(road.dit, replace(OPTIONS, **changes), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_what_is_no_dit_run_is_refused(road: Road, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        evaluate_run(tmp_path / "absent", OPTIONS)
    with pytest.raises(ValueError, match="stage=vae draws no videos"):
        evaluate_run(road.vae, OPTIONS)


@pytest.mark.dist
def test_the_command_shares_the_work(road: Road, tmp_path: Path) -> None:
    """A real call on two processes; a mistake is one line, told before they start."""
    command = [sys.executable, "-m", "longtake.launch.cli", "evaluate", str(road.dit)]
    few = ["--prompts", "2", "--pairs", "0", "--splits", "val", "--weights", "ema", "--show", "0"]
    both = ["--nproc", "2", "--device", "cpu", "--out", str(tmp_path / "out")]
    run = subprocess.run([*command, *few, *both], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "card.mean" in run.stdout
    assert len(read_rows(tmp_path / "out" / "clips.parquet")) == 2 * 2 * 2
    wrong = [*command, "--families", "candel", "--nproc=2"]
    run = subprocess.run(wrong, capture_output=True, text=True)
    assert run.returncode == 1 and "candel" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
