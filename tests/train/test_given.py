"""What samples are given: fixed draws, a curriculum, clips too short; files; nothing that leaks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longtake.data.decode import encode_image, encode_video
from longtake.data.plan.planned import PlannedSample
from longtake.models.conditioning import GivenFrames
from longtake.models.text import TextConfig, Tokenizer
from longtake.train.caption_rows import CaptionRows, join_words
from longtake.train.codec import Codec, load_codec
from longtake.train.config import parse_config
from longtake.train.given import Conditions, at_step, task_weights
from longtake.train.given_files import read_given
from longtake.train.runs import load_dit, load_vae
from longtake.train.schema import DiTRun

from .conftest import Road
from .small_runs import VAE_SIZES
from .tiny_runs import losses, options, train_here, tree

IDENTITY = Codec(3, (1, 1, 1), torch.tensor(0.0), torch.tensor(1.0))
SAMPLE = PlannedSample(
    *(0, 0, 1, "key", 0, (9, 16, 16), (0.0,), 8.0, (0.5, 0.5), False, "short", 7, 0, (0, 0))
)
EVERY = "tasks={t2v: 1, i2v: 1, extend_forward: 1, extend_backward: 1, join: 1, random_frames: 1}"


def config_of(*more: str) -> DiTRun:
    config = parse_config(tree(options(Path("shards"), Path("run"), *more)))
    assert isinstance(config, DiTRun)
    return config


def bucket(*frames: int) -> str:
    shapes = (f"{{frames: {n}, height: 16, width: 16, batch_size: 2}}" for n in frames)
    return f"data.buckets=[{', '.join(shapes)}]"


def test_the_curriculum_is_a_straight_line_between_its_points() -> None:
    config = config_of(
        *("tasks={t2v: 2.0, i2v: 0}", "timesteps.shift=20"),
        "curriculum=[{step: 10, tasks: {t2v: 1}}, {step: 12, shift: 20}, "
        "{step: 20, tasks: {t2v: 0.5, join: 0.5}, shift: 8}]",
    )
    at = [task_weights(config.task_stages, step) for step in (0, 5, 10, 15, 20, 99)]
    assert [w["t2v"] for w in at] == [2.0, 1.5, 1.0, 0.75, 0.5, 0.5]
    assert [w["join"] for w in at] == [0, 0, 0, 0.25, 0.5, 0.5]
    shifts = [at_step(config.shift_stages, step) for step in (0, 12, 14, 20, 99)]
    assert shifts == [20, 20, 17, 8, 8]


def test_draws_depend_on_sample_and_step_alone() -> None:
    config = config_of(
        *(EVERY, "given.dropout=0.5", "given.noise=0.2", bucket(9)),
        "curriculum=[{step: 100, tasks: {t2v: 1}}]",
    )
    conditions = Conditions(config, IDENTITY)
    samples = [replace(SAMPLE, seed=seed) for seed in range(400)]
    first = [conditions.draw(sample, 0) for sample in samples]
    assert first == [Conditions(config, IDENTITY).draw(sample, 0) for sample in samples]
    assert {one.task for one in first} == set(config.trained_tasks)
    assert {conditions.draw(sample, 100).task for sample in samples} == {"t2v"}
    join = [one for one in first if one.task == "join"]
    assert {tuple(run.start > 0 for run in one.frames.runs) for one in join} == {
        (), (False,), (True,), (False, True),
    }  # fmt: skip
    assert all(0 < one.level < 0.2 if one.frames.runs else one.level == 0 for one in first)
    assert {conditions.num_noisy(s, 0) for s in samples} <= {16 * n for n in range(1, 10)}


def test_a_clip_that_is_too_short_draws_among_the_other_tasks() -> None:
    tasks = "tasks={t2v: 0, t2i: 1, i2v: 1, join: 1}"
    conditions = Conditions(config_of(tasks, bucket(1, 3, 9)), IDENTITY)
    for length, names in ((1, {"t2i"}), (3, {"i2v"}), (9, {"i2v", "join"})):
        shape = (length, 16, 16)
        drawn = [conditions.draw(replace(SAMPLE, seed=i, shape=shape), 0) for i in range(30)]
        assert {one.task for one in drawn} == names


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("tasks={t2v: 0, i2v: 1}", bucket(1, 5)), "data.buckets has 1x16x16, which none of the"),
        (("tasks.join=1", bucket(3)), r"tasks.join fits no bucket: it needs 5 latent frames"),
        (
            ("tasks.first_last=1", "codec=vae", "model.patch_size=[2,4,4]"),
            r"model.patch_size\[0\]=2 must be 1 for tasks.first_last > 0 with codec=vae",
        ),
        (("tasks.i2v=1", "model.patch_size=[2,4,4]"), r"model.patch_size\[0\]=2 must be 1"),
        (("curriculum=[{step: 0, tasks: {t2v: 1}}]",), r"curriculum has steps \[0\]"),
        (("curriculum=[{step: 5, tasks: {v: 1}}]",), r"curriculum.0.tasks.v: unknown task"),
        (("curriculum=[{step: 5}]",), r"curriculum.0 changes nothing"),
        (("curriculum=[{step: 5, shift: 0}]",), r"curriculum.0.shift=0.0 must be positive"),
        (("given.noise=1",), "given.noise=1"),
        (("numbers.dropout=1",), "numbers.dropout=1"),
        (("timesteps.mode_scale=2",), "timesteps.mode_scale=2"),
        (("timesteps.distribution=cauchy",), "timesteps.distribution"),
    ],
)
def test_mistakes_are_named_at_the_start(more: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Conditions(config_of(*more), IDENTITY)


@pytest.mark.parametrize("is_trained", [False, True])
def test_conditions_do_not_change_with_the_frames_to_be_generated(
    road: Road, shards: Path, tmp_path: Path, is_trained: bool
) -> None:
    """Through a causal VAE; and a clip's own latents of these frames do."""
    codec = load_codec(load_dit(road.dit).config, folder=road.dit)
    if is_trained:
        more = f"init_from={road.vae}", "optim.lr=3e-3", "tracking=jsonl"
        assert train_here(options(shards, tmp_path, *more, task=["stage=vae", *VAE_SIZES])) == 0
        told = losses(tmp_path)
        assert told[12] < 0.8 * told[1]
        codec = replace(codec, vae=load_vae(tmp_path, "raw").vae)
    for task, frames in (
        ("extend_forward", [0, 1, 2, 3, 4]),
        ("extend_backward", [10, 11, 12]),
        ("first_last", [0, 12]),
        ("in_between", [0, 6, 12]),
        ("join", [0, 1, 2, 3, 4, 10, 11, 12]),
        ("random_frames", [0, 2, 6, 12]),
    ):
        clip, other = torch.rand(2, 1, 3, 13, 16, 16) * 2 - 1
        given = codec.given(task, codec.latent_frames(13), 1)
        assert codec.pixel_frames(given) == frames
        other[:, :, frames] = clip[:, :, frames]
        whole, changed = codec.encode(clip), codec.encode(other)
        first, second = (codec.encode_given(x, given) for x in (clip, other))
        assert torch.equal(first, second)
        for run in given.in_place:
            torch.testing.assert_close(first[:, :, run], whole[:, :, run], atol=1e-5, rtol=1e-5)
        pairs = zip(*(codec.encode_segments(x, given) for x in (clip, other)), strict=True)
        for run, (one, two) in zip(given.segments, pairs, strict=True):
            assert one.start == run.start and one.latents.shape[2] == len(run)
            assert torch.equal(one.latents, two.latents)
            assert (changed[:, :, list(run)] - whole[:, :, list(run)]).abs().mean() > 0.01


def test_files_land_where_the_task_gives_them(tmp_path: Path) -> None:
    config = config_of("tasks={t2v: 1, join: 1, random_frames: 1, extend_forward: 1}", bucket(9))
    ramp = np.arange(12, dtype=np.uint8)[:, None, None, None] * 20 + np.zeros((1, 16, 16, 3))
    (tmp_path / "clip.mp4").write_bytes(encode_video(ramp.astype(np.uint8), 8.0))
    (tmp_path / "white.png").write_bytes(encode_image(np.full((16, 16, 3), 255, np.uint8)))
    clip, image, shape = str(tmp_path / "clip.mp4"), str(tmp_path / "white.png"), (9, 16, 16)

    def levels(task: str, *files: str) -> dict[int, int]:
        given = read_given(task, files, config, IDENTITY, shape, 8.0)
        assert given is not None
        means = given.clips[0].add(1).mul(127.5).mean((0, 2, 3))
        return {i: round(means[i].item() / 20) for i in IDENTITY.pixel_frames(given.frames)}

    assert levels("join", clip, clip) == {0: 9, 1: 10, 2: 11, 6: 0, 7: 1, 8: 2}
    assert levels("random_frames", f"{image}@2", f"{image}@7") == {2: 13, 7: 13}
    assert read_given("t2v", (), config, IDENTITY, shape, 8.0) is None
    for task, files, message in (
        ("join", (clip,), r"takes 2 files of \[3, 3\] frames for a video of 9, got 1"),
        ("join", (clip, image), "has 1 frames at 8 per second, 3 are needed"),
        ("t2v", (clip,), "takes 0 files"),
        ("first_last", (clip, clip), "trained on t2v, extend_forward, join, random_frames only"),
        ("random_frames", (f"{clip}@9",), "must start at a multiple of 1 within the video"),
    ):
        with pytest.raises(ValueError, match=message):
            read_given(task, files, config, IDENTITY, shape, 8.0)


def test_files_can_be_given_anywhere_with_a_vae(road: Road, tmp_path: Path) -> None:
    """At multiples of its stride, in any order; behind the beginning as segments."""
    config = replace(load_dit(road.dit).config, tasks={"random_frames": 1.0})
    codec, shape = load_codec(config, folder=road.dit), (9, 16, 16)
    grey = np.full((3, 16, 16, 3), 99, np.uint8)
    (tmp_path / "clip.mp4").write_bytes(encode_video(grey, 8.0))
    (tmp_path / "white.png").write_bytes(encode_image(np.full((16, 16, 3), 255, np.uint8)))
    clip, image = str(tmp_path / "clip.mp4"), str(tmp_path / "white.png")
    given = read_given("random_frames", [f"{clip}@6", f"{image}@0"], config, codec, shape, 8.0)
    assert given is not None
    assert given.frames == GivenFrames((range(1),), (range(3, 5),))
    assert given.clips[0, :, 0].min() > 0.9 and given.clips[0, :, 6:].abs().max() < 0.5
    for files, message in (
        ([f"{image}@3"], "must start at a multiple of 2 within the video"),
        ([f"{clip}@4", f"{image}@6"], "must start at 8 or later, behind the file before"),
    ):
        with pytest.raises(ValueError, match=message):
            read_given("random_frames", files, config, codec, shape, 8.0)


def test_numbers_stand_behind_a_caption_and_a_long_one_makes_room() -> None:
    tokenizer = Tokenizer(TextConfig(max_length=32))
    for caption in ("a red circle", "一个红色的圆在移动", "a red circle moves left for ever"):
        (row,) = tokenizer([caption])
        told = join_words(row, {"fps": 8.0, "motion": 0.123456}, tokenizer)
        text = tokenizer.tokenizer.decode(told, skip_special_tokens=True, errors="ignore")
        assert text.endswith("(fps 8, motion 0.123)") and len(told) <= 32
        assert torch.equal(told[:10], row[:10])


def test_what_is_told_behind_captions_is_told_behind_prompts(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    told, of_texts = [], CaptionRows.of_texts

    def keep(rows: CaptionRows, captions: Any, numbers: Any) -> Any:
        told.append(list(numbers))
        return of_texts(rows, captions, numbers)

    monkeypatch.setattr(CaptionRows, "of_texts", keep)
    more = "samples.prompts=[red,blue]", "numbers.sources={fps: fps}", "train.sample_every=1"
    assert train_here(options(shards, tmp_path / "run", *more, "train.steps=1")) == 0
    assert told == [[{"fps": 8.0}] * 2] * 4  # prompts and negative ones, at steps 0 and 1
    nobody = options(shards, tmp_path / "no", "numbers.sources={motion: nosuchscore}")
    assert train_here(nobody) == 1
    assert "numbers.sources.motion=nosuchscore: no sample" in capfd.readouterr().err
    assert not (tmp_path / "no").exists()
