"""Tasks through a VAE: frames behind the beginning are encoded alone and stand beside the clip."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longtake.data.config import BucketConfig
from longtake.data.decode import encode_image, encode_video
from longtake.data.latents import read_manifest, write_manifest
from longtake.data.loader import Batch, Loader, read_batches
from longtake.data.plan import Plan
from longtake.data.plan.val_plan import ValPlan
from longtake.models.conditioning import GivenFrames
from longtake.models.cost import forward_flops
from longtake.models.sampler import Given, SamplerConfig, sample
from longtake.models.tokens import Segment
from longtake.train.codec import load_codec
from longtake.train.config import parse_config
from longtake.train.dit_task import DiTTask
from longtake.train.encode import encode_shards
from longtake.train.engine import Engine, single_process
from longtake.train.evaluate import EvaluateOptions, evaluate_run
from longtake.train.evaluate_clips import ClipsOptions, evaluate_clips
from longtake.train.given import needed_segments
from longtake.train.sample import SampleRequest, sample_to_files
from longtake.train.schema import DiTRun
from longtake.train.setup import check
from tests.train.forked import import_before_fork, run_ranks
from tests.train.tiny_runs import losses, train_here, train_on_rank, tree

from .conftest import Road, small_text
from .small_runs import SIDE, four_steps, shake, train_and_resume, write_world

FRAMES, LATENTS = 9, 5
FRAME_TOKENS = 4 * 4  # of a latent frame of 8×8 in patches of (1, 2, 2)
GIVING = "extend_backward", "first_last", "in_between", "join", "random_frames"
SEGMENTS = "suffix:3", "last", "every:2"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("pixels") / "world", num_clips=8, frames=FRAMES)


@pytest.fixture(scope="module")
def latents(road: Road, pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents") / "with"
    options = replace(small_text(), frames=FRAMES, segments=SEGMENTS)
    encode_shards(road.vae, pixels, folder, options)
    return folder


def overrides(latents: Path, folder: Path, *more: str) -> list[str]:
    return four_steps(latents, folder, FRAMES, ("t2v", *GIVING), *more)


@pytest.fixture(scope="module")
def task(latents: Path) -> DiTTask:
    """Every task that gives segments, some dropped, all with noise."""
    more = "given.noise=0.3", "given.dropout=0.2"
    config = parse_config(tree(overrides(latents, latents / "run", *more)))
    assert isinstance(config, DiTRun)
    torch.manual_seed(0)
    task = DiTTask(config, CPU, load_codec(config))
    shake(task.module)
    return task


def engine_of(task: DiTTask) -> Engine:
    return Engine(task.module, task.config.optim, task.config.engine, single_process())


def joined_batch(task: DiTTask) -> Batch:
    """Twelve clips that draw all kinds of tasks."""
    batches = next(iter(Loader(Plan.from_config(task.config.data, 0), range(4))))
    clips = [clip for batch in batches for clip in batch.clips]
    seeded = [
        replace(clip, sample=replace(clip.sample, seed=seed))
        for seed, clip in enumerate([*clips, *clips[:4]])
    ]
    return replace(batches[0], clips=seeded)


def test_training_and_sampling_are_shown_the_same(
    task: DiTTask, latents: Path, pixels: Path
) -> None:
    """What is stored is what the codec makes of the pixels."""
    plans = [
        ValPlan.from_config(replace(task.config.data, val=[replace(dataset, path=str(path))]), 0, 8)
        for dataset in task.config.data.val
        for path in (latents, pixels)
    ]
    clips, shots = (
        [c for b in read_batches(p.tables, p.config, p.micro_batches(0, 1)) for c in b.clips]
        for p in plans
    )
    assert [c.sample.key for c in clips] == [s.sample.key for s in shots]
    for name in GIVING:
        drawn = task.conditions.fixed(name, LATENTS)
        assert drawn.frames.segments
        for clip, shot in zip(clips, shots, strict=True):
            assert shot.video is not None
            video = shot.video[None].float() / 127.5 - 1
            made = task.codec.encode_segments(video, drawn.frames)
            for ours, theirs in zip(task.segments(clip, drawn), made, strict=True):
                assert ours.start == theirs.start
                torch.testing.assert_close(
                    ours.latents, theirs.latents[0], rtol=1e-2, atol=2e-2
                )  # bf16


def test_the_sampler_asks_what_training_taught(task: DiTTask) -> None:
    """At pure noise both call the DiT alike: the same answer, in a pack and in a batch."""
    batch, answers = replace(joined_batch(task), clips=joined_batch(task).clips[:2]), []
    for name in GIVING:
        drawn = [replace(task.conditions.fixed(name, LATENTS), level=0.25)] * 2
        (noised,) = task._noise(batch, torch.ones(2), drawn)
        rows = task.captions.whole(batch.clips)
        text = task.module.encode(rows)
        segments = [
            Segment(torch.stack([s.latents for s in both]), both[0].start)
            for both in zip(*noised.segments, strict=True)
        ]
        assert [s.start for s in segments] == [run.start for run in drawn[0].frames.segments]

        def dit(*args: Any, **conditions: Any) -> torch.Tensor:
            answers.append(task.module.dit(*args, **conditions))
            return answers[-1]

        sample(
            *(dit, noised.noise, text),
            config=SamplerConfig(steps=1, guidance_scale=1.0),
            given=Given(noised.clean, noised.given, task.patch_size, 0.25, segments),
        )
        (taught,) = task._predict(engine_of(task), [noised], rows)
        torch.testing.assert_close(answers[-1], taught, rtol=1e-4, atol=1e-5)


def test_the_loss_of_a_sample_does_not_depend_on_its_batch(task: DiTTask) -> None:
    """Samples that are given different segments share one forward; all are counted right."""
    engine, joined = engine_of(task), joined_batch(task)
    alone = [replace(joined, clips=[clip]) for clip in joined.clips]
    drawn = [task.conditions.draw(sample, 0) for sample in joined.samples]
    assert len({one.frames for one in drawn}) > 5
    with torch.no_grad():
        whole = task.loss(engine, joined).total.item()
        single = [task.loss(engine, one).total.item() for one in alone]
    assert sum(single) == pytest.approx(whole, rel=1e-5)
    for one, batch in zip(drawn, alone, strict=True):
        beside = FRAME_TOKENS * sum(map(len, one.frames.segments))
        assert task.tokens(batch) == FRAME_TOKENS * LATENTS + beside
        given = FRAME_TOKENS * sum(map(len, one.frames.in_place))
        assert task.weight(batch) == FRAME_TOKENS * LATENTS - given
        config, text = task.config.model, task.config.text.max_length
        flops = forward_flops(config, task.tokens(batch), text_rows=0, text_keys=text)
        assert task.flops(batch) == 3 * flops


def test_segments_are_read_and_bear_no_loss(task: DiTTask) -> None:
    engine, batch = engine_of(task), joined_batch(task)
    drawn = [task.conditions.draw(sample, 0) for sample in batch.samples]
    number = [one.frames for one in drawn].index(GivenFrames((), (range(3, 5),)))
    clip = batch.clips[number]
    (segment,) = task.segments(clip, drawn[number])
    batch = replace(batch, clips=[clip])

    def loss() -> float:
        with torch.no_grad():
            return task.loss(engine, batch).total.item()

    before = loss()
    clip.segments = {name: replace(s, latents=s.latents + 1) for name, s in clip.segments.items()}
    assert loss() != before  # the model sees it
    assert segment.start == 3
    (noised,) = task._noise(batch, torch.tensor([0.5]), drawn[number : number + 1])
    assert not noised.given.any()  # its place in the clip is to be generated
    torch.testing.assert_close(noised.noisy, (noised.clean + noised.noise) / 2)


def test_noise_on_segments_is_drawn_once_and_is_not_that_of_the_video(task: DiTTask) -> None:
    clip = joined_batch(task).clips[0]
    clean = task.conditions.fixed("first_last", LATENTS)
    shown = [task.segments(clip, replace(clean, level=level))[0].latents for level in (0, 0.5, 0.5)]
    assert torch.equal(shown[1], shown[2])
    noise = 2 * shown[1] - shown[0]
    assert 0.7 < noise.std() < 1.3
    (video,) = task._noise(replace(joined_batch(task), clips=[clip]), torch.ones(1), [clean])
    assert (
        torch.corrcoef(torch.stack((noise.flatten(), video.noise[0, :, -1:].flatten())))[0, 1] < 0.3
    )


def test_a_run_trains_resumes_exactly_and_draws(
    latents: Path, pixels: Path, tmp_path: Path
) -> None:
    whole = train_and_resume(lambda run: overrides(latents, run), tmp_path)
    cell = f"val/loss/t0.50/{FRAMES}x{SIDE}x{SIDE}"
    for name in GIVING:
        assert set(losses(whole, f"{cell}/{name}")) == {0, 4}
        assert list((whole / "samples").rglob(f"{name}-00*"))
    evaluate_and_sample(whole, pixels, tmp_path)


def evaluate_and_sample(run: Path, pixels: Path, folder: Path) -> None:
    """By `longtake evaluate`, of world prompts and of clips, and from files."""
    options = EvaluateOptions(
        splits=("val",), num_prompts=1, num_pairs=0, num_shown=0, weights=("ema",)
    )
    card = evaluate_run(run, options).card
    assert {score.task for score in card.scores} == {"t2v", *GIVING}
    assert {"given_kept"} <= {s.name for s in card.scores if s.task == "first_last"}
    clips = ClipsOptions(tasks=("in_between",), num_clips=2, num_shown=0, memorisation=False)
    (scores,) = evaluate_clips(run, pixels, clips, folder / "clips").card.tasks
    assert {measure.name for measure in scores.measures} >= {"loss", "psnr"}
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (FRAMES, SIDE, SIDE, 3), np.uint8)
    (folder / "clip.mp4").write_bytes(encode_video(grey, 8.0))
    (folder / "still.png").write_bytes(encode_image(grey[0]))
    clip, still = str(folder / "clip.mp4"), str(folder / "still.png")
    for task, files, noise in (
        ("join", [clip, clip], 0.2),
        ("random_frames", [f"{still}@4", f"{still}@0"], 0.0),
    ):
        request = SampleRequest(
            ["a red circle"], task=task, given=files, given_noise=noise, frames=FRAMES, upscale=1
        )
        assert sample_to_files(run, request, folder / task, device="cpu")


def test_latents_without_the_segments_are_refused_before_anything_starts(
    task: DiTTask, latents: Path, tmp_path: Path
) -> None:
    bare, config = tmp_path / "bare", task.config
    shutil.copytree(latents, bare)
    manifest = replace(read_manifest(latents), segments=())
    write_manifest(bare, manifest)
    data = {
        name: [replace(getattr(config.data, name)[0], path=str(bare))] for name in ("train", "val")
    }
    without = replace(config, data=replace(config.data, **data))
    with pytest.raises(ValueError, match=r"lacks suffix:3, last, every:2; run `longtake encode"):
        check(without)
    check(replace(without, tasks={"t2v": 1.0, "i2v": 1.0}))
    with pytest.raises(ValueError, match=r"bare.*lacks last; run .*--segments last"):
        val = replace(config.data, val=data["val"])
        check(replace(config, data=val, tasks={"first_last": 1.0}))
    buckets = [BucketConfig(frames, 64, 64, 1) for frames in (1, 81)]
    long = replace(config, data=replace(config.data, buckets=buckets))
    wanted = needed_segments(long, replace(manifest, strides=(4, 8, 8)))
    assert set(wanted) == {"suffix:5", "suffix:13", "suffix:29", "last", "every:4"}


def test_every_micro_batch_runs_the_same_modules(task: DiTTask) -> None:
    """Whatever its samples draw: ranks that hold a part of each parameter gather them together."""
    calls: list[str] = []
    engine, joined, drawn = engine_of(task), joined_batch(task), []
    for name, module in task.module.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    for clip in joined.clips:
        drawn.append(task.conditions.draw(clip.sample, 0).frames)
        task.loss(engine, replace(joined, clips=[clip]))
    assert len({(bool(one.in_place), bool(one.segments)) for one in drawn}) == 3
    assert calls == calls[: len(calls) // len(drawn)] * len(drawn)


@pytest.mark.dist
@pytest.mark.parametrize(
    "engine",
    [
        "shared",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2", "deepspeed_zero3")),
    ],
)
def test_ranks_that_draw_other_segments_see_the_losses_of_one(
    engine: str, latents: Path, tmp_path: Path
) -> None:
    import_before_fork()
    assert train_here(overrides(latents, tmp_path / "one")) == 0
    more = [f"engine={engine}"] if engine != "shared" else ["engine.sequence_parallel=2"]
    command = overrides(latents, tmp_path / "two", *more, "train.val_every=4")
    assert run_ranks(2, train_on_rank, [*command, "engine.precision=fp32"]) == [0, 0]
    two = losses(tmp_path / "two")
    assert two == {s: pytest.approx(x, rel=1e-4) for s, x in losses(tmp_path / "one").items()}
