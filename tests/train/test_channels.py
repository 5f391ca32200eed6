"""Models that see what is given as channels behind the noisy latents: Wan's image-to-video form."""

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longtake.data.config import BucketConfig
from longtake.data.decode import encode_image
from longtake.data.latents import read_manifest, write_manifest
from longtake.data.loader import Batch, Clip, read_batches
from longtake.data.plan.val_plan import ValPlan
from longtake.models.sampler import SamplerConfig, sample
from longtake.train.codec import load_codec
from longtake.train.config import check_exportable, parse_config
from longtake.train.dit_task import DiTTask
from longtake.train.encode import encode_shards
from longtake.train.engine import Engine, single_process
from longtake.train.evaluate import EvaluateOptions, evaluate_run
from longtake.train.evaluate_clips import ClipsOptions, evaluate_clips
from longtake.train.export import export_run
from longtake.train.given import needed_segments, shown_name
from longtake.train.runs import load_dit
from longtake.train.sample import SampleRequest, sample_to_files
from longtake.train.schema import DiTRun
from longtake.train.setup import check
from tests.train.tiny_runs import losses, tree

from .conftest import Road, small_text
from .small_runs import SIDE, four_steps, shake, train_and_resume, write_dit_run, write_world

FRAMES = 9
SHOWN = "shown:0", "shown:1", "shown:1+1", "shown:3", "shown:0+3", "shown:3+3", "shown:0+1"
CHANNELS = "model.in_channels=10"  # 4 of the VAE twice, and its stride in time
GIVEN = {  # pixel frames of nine, where draws are the middle
    "t2v": [], "i2v": [0], "first_last": [0, 8], "extend_forward": [0, 1, 2],
    "extend_backward": [6, 7, 8], "join": [0, 1, 2, 6, 7, 8],
}  # fmt: skip
OF_PIXELS = GIVEN | {"in_between": [0, 3, 6], "random_frames": [0, 1, 3, 6, 8]}
TASKS = tuple(GIVEN)
IDENTITY = "codec=identity", "model.in_channels=7", "model.out_channels=3"


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("pixels") / "world", num_clips=8, frames=FRAMES)


@pytest.fixture(scope="module")
def latents(road: Road, pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents") / "shown"
    encode_shards(road.vae, pixels, folder, replace(small_text(), frames=FRAMES, segments=SHOWN))
    return folder


def overrides(data: Path, folder: Path, *more: str) -> list[str]:
    return four_steps(data, folder, FRAMES, TASKS, CHANNELS, *more)


def only(name: str) -> str:
    return f"tasks={{{', '.join(f'{task}: {int(task == name)}' for task in OF_PIXELS)}}}"


def parsed(data: Path, *more: str) -> DiTRun:
    config = parse_config(tree(overrides(data, data / "run", *more)))
    assert isinstance(config, DiTRun)
    return config


def task_of(data: Path, *more: str) -> DiTTask:
    config = parsed(data, *more)
    torch.manual_seed(0)
    task = DiTTask(config, torch.device("cpu"), load_codec(config))
    shake(task.module)
    return task


@pytest.fixture(scope="module", params=["vae", "identity"])
def task(request: pytest.FixtureRequest, latents: Path, pixels: Path) -> DiTTask:
    return task_of(latents) if request.param == "vae" else task_of(pixels, *IDENTITY)


def batch_of(task: DiTTask, path: Path | None = None) -> Batch:
    """Eight clips that draw all tasks, in one batch."""
    val = [replace(task.config.data.val[0], **({} if path is None else {"path": str(path)}))]
    plan = ValPlan.from_config(replace(task.config.data, val=val), 0, 8)
    batches = list(read_batches(plan.tables, plan.config, plan.micro_batches(0, 1)))
    clips = [clip for batch in batches for clip in batch.clips]
    assert len(clips) == 8

    def seeded(number: int, clip: Clip) -> Clip:
        return replace(clip, sample=replace(clip.sample, seed=4 * number))  # they draw all tasks

    return replace(batches[0], clips=[seeded(*pair) for pair in enumerate(clips)])


@pytest.mark.parametrize(
    ("codec", "name"),
    [("vae", name) for name in GIVEN] + [("identity", name) for name in OF_PIXELS],
)
def test_they_show_the_given_frames_alone(
    codec: str, latents: Path, pixels: Path, name: str
) -> None:
    """What is stored is what the codec makes of pixels, and of no others than those given."""
    task = task_of(latents) if codec == "vae" else task_of(pixels, *IDENTITY, only(name))
    batch, shots = batch_of(task), batch_of(task, pixels)
    assert [c.sample.key for c in batch.clips] == [c.sample.key for c in shots.clips]
    drawn = [task.conditions.fixed(name, task.conditions.latent_shape(batch.samples[0])[0])] * 8
    frames = [one.frames for one in drawn]
    assert not frames[0].in_place and not frames[0].segments
    video, shown = shots.stack_video(), OF_PIXELS[name]
    made, stored = task.codec.encode_channels(video, frames), task.channels(batch, drawn)
    assert made is not None and stored is not None
    torch.testing.assert_close(stored, made, rtol=1e-2, atol=2e-2)  # bf16
    other = torch.rand_like(video)
    other[:, :, shown] = video[:, :, shown]
    again = task.codec.encode_channels(other, frames)
    assert again is not None
    assert torch.equal(again, made)
    stride = task.codec.strides[0]
    flags = made[:, :stride, :, 0, 0].transpose(1, 2).flatten(1)[:, stride - 1 :]  # (B, F)
    assert flags.nonzero().tolist() == [[row, frame] for row in range(8) for frame in shown]


def test_all_frames_are_noisy_and_bear_loss(task: DiTTask) -> None:
    """The loss of a sample is its own, whatever the others are given, and sees the channels."""
    engine = Engine(task.module, task.config.optim, task.config.engine, single_process())
    assert not task.in_packs
    batch = batch_of(task)
    drawn = [task.conditions.draw(sample, 0) for sample in batch.samples]
    assert {one.task for one in drawn} == set(TASKS)
    assert task.weight(batch) == task.tokens(batch)
    (noised,) = task._noise(batch, torch.full((8,), 0.5), drawn)
    torch.testing.assert_close(noised.noisy, (noised.clean + noised.noise) / 2)
    assert noised.seen.shape[1] == task.config.model.in_channels
    with torch.no_grad():
        whole = task.loss(engine, batch).total.item()
        alone = [
            task.loss(engine, replace(batch, clips=[clip])).total.item() for clip in batch.clips
        ]
        without = replace(noised, channels=torch.zeros_like(noised.channels))  # type: ignore[arg-type]
        rows = task.captions.whole(batch.clips)
        assert not torch.equal(*(task._errors(engine, [n], rows) for n in (noised, without)))
    assert sum(alone) == pytest.approx(whole, rel=1e-5)


def test_the_sampler_asks_what_training_taught(task: DiTTask) -> None:
    """At pure noise both call the DiT alike, and for nothing given as for t2v."""
    engine = Engine(task.module, task.config.optim, task.config.engine, single_process())
    batch, answers = batch_of(task), []
    rows = task.captions.whole(batch.clips)
    text, shape = task.module.encode(rows), task.conditions.latent_shape(batch.samples[0])

    def dit(*args: Any, **conditions: Any) -> torch.Tensor:
        answers.append(task.module.dit(*args, **conditions))
        return answers[-1]

    for name in TASKS:
        drawn = [task.conditions.fixed(name, shape[0])] * 8
        (noised,) = task._noise(batch, torch.ones(8), drawn)
        shown = task.codec.no_channels(shape, 8) if name == "t2v" else noised.channels
        config = SamplerConfig(steps=1, guidance_scale=1.0)
        sample(dit, noised.noise, text, config=config, channels=shown)
        (taught,) = task._predict(engine, [noised], rows)
        atol = 1e-2 if name == "t2v" else 1e-5  # the cache holds bf16
        torch.testing.assert_close(answers[-1], taught, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("codec", ["vae", "identity", "packs"])
def test_a_run_trains_resumes_exactly_and_draws(
    codec: str, latents: Path, pixels: Path, tmp_path: Path
) -> None:
    more = {"vae": (), "identity": IDENTITY, "packs": ("data.pack=true", "data.cost.max_tokens=160",
            "data.cost.token=[2,4,4]")}[codec]  # fmt: skip
    data = pixels if codec == "identity" else latents
    dropped = "given.dropout=0.2"
    whole = train_and_resume(lambda run: overrides(data, run, dropped, *more), tmp_path)
    assert set(losses(whole, f"val/loss/t0.50/{FRAMES}x{SIDE}x{SIDE}/i2v")) == {0, 4}
    assert list((whole / "samples").rglob("i2v-00*"))
    options = EvaluateOptions(
        splits=("val",), num_prompts=1, num_pairs=0, num_shown=0, weights=("ema",)
    )
    assert {score.task for score in evaluate_run(whole, options).card.scores} == set(TASKS)
    judged = ClipsOptions(tasks=("i2v",), num_clips=2, num_shown=0, memorisation=False)
    (scores,) = evaluate_clips(whole, pixels, judged, tmp_path / "clips").card.tasks
    assert {measure.name for measure in scores.measures} >= {"loss", "psnr"}
    still = tmp_path / "still.png"
    still.write_bytes(encode_image(np.full((SIDE, SIDE, 3), 90, np.uint8)))
    for name, given in (("t2v", []), ("i2v", [str(still)]), ("first_last", [str(still)] * 2)):
        request = SampleRequest(["a red circle"], task=name, given=given, frames=FRAMES, upscale=1)
        assert sample_to_files(whole, request, tmp_path / name, device="cpu")
    with pytest.raises(ValueError, match=r"--given-noise 0\.2 must be 0: given frames"):
        sample_to_files(whole, replace(request, given_noise=0.2), tmp_path / "no", device="cpu")
    placed = replace(request, given=[f"{still}@0", f"{still}@4"])
    if codec == "identity":
        assert sample_to_files(whole, placed, tmp_path / "placed", device="cpu")
    else:
        with pytest.raises(ValueError, match="--given …@4: only the beginning and the end of 9"):
            sample_to_files(whole, placed, tmp_path / "no", device="cpu")


def test_exported_as_the_stock_image_to_video_pipeline(
    road: Road, latents: Path, tmp_path: Path
) -> None:
    buckets = ", ".join(f"{{frames: {n}, height: 16, width: 16, batch_size: 2}}" for n in (1, 9))
    ends = "tasks.first_last=1", f"data.buckets=[{buckets}]"
    run = write_dit_run(tmp_path / "dit", latents, CHANNELS, f"vae_run={road.vae}", *ends)
    report = export_run(run, tmp_path / "pipeline")
    assert set(report.worst) == {"i2v", "first_last"}
    assert all(0 < difference < 1e-3 for difference in report.worst.values())
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "WanImageToVideoPipeline"
    assert index["image_encoder"] == [None, None] and not index["expand_timesteps"]
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert "image-to-video" in card and "import WanPipeline" not in card
    assert "last_image=" in card and "num_frames=9" in card
    later = "tasks={t2v: 1, i2v: 0}", "curriculum=[{step: 9, tasks: {i2v: 1}}]"
    check_exportable(load_dit(write_dit_run(tmp_path / "later", latents, CHANNELS, *later)).config)
    text_only = write_dit_run(tmp_path / "text", latents, CHANNELS, "tasks={t2v: 1, i2v: 0}")
    with pytest.raises(ValueError, match=r"tasks\.i2v=0 must be > 0 with model\.in_channels=10"):
        export_run(text_only, tmp_path / "none")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["model.in_channels=8"], r"out_channels=4 must equal model\.in_channels=8, or leave room"),
        ([*IDENTITY, "model.in_channels=9"], r"in_channels=9 must be 3 .* or 7"),
        (["tasks.in_between=1"], r"tasks\.in_between must be 0 with model\.in_channels=10"),
        (["given.noise=0.1"], r"given\.noise=0\.1 must be 0 with model\.in_channels=10"),
    ],
)
def test_what_the_form_cannot_do_is_refused(latents: Path, more: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parsed(latents, *more)


def test_latents_that_do_not_fit_are_refused_before_anything_starts(
    latents: Path, tmp_path: Path
) -> None:
    check(parsed(latents))
    with pytest.raises(ValueError, match="in_channels=11 and out_channels=4 must be 10 and 4"):
        check(parsed(latents, "model.in_channels=11"))
    bare = tmp_path / "bare"
    shutil.copytree(latents, bare)
    write_manifest(bare, replace(read_manifest(latents), segments=()))
    with pytest.raises(ValueError, match=r"lacks shown:1; run .*--segments shown:1"):
        check(parsed(bare, only("i2v")))
    with pytest.raises(ValueError, match="lacks shown:0, shown:1;"):
        check(parsed(bare, only("i2v"), "given.dropout=0.1"))
    with pytest.raises(ValueError, match=r"lacks shown:0, shown:0\+3, shown:3, shown:3\+3;"):
        check(parsed(bare, only("join"), "given.dropout=0.1"))


@pytest.mark.parametrize("name", ["mean", "std"])
def test_latents_normalised_otherwise_are_refused(latents: Path, tmp_path: Path, name: str) -> None:
    other, manifest = tmp_path / "other", read_manifest(latents)
    shutil.copytree(latents, other)
    values = [value + 0.5 for value in getattr(manifest, name)]
    write_manifest(other, replace(manifest, **{name: values}))
    there, here = latents / "latents.json", other / "latents.json"
    said = rf"{there} has {name}\[0\]=.*{here} has .*--stats-from {latents}$"
    with pytest.raises(ValueError, match=said):
        check(parsed(latents, f"data.val.0.path={other}"))


@pytest.mark.parametrize("dropout", [0, 0.1])
def test_ends_are_drawn_and_dropped_each_by_itself(latents: Path, dropout: float) -> None:
    manifest = replace(read_manifest(latents), strides=(4, 8, 8))
    config = parsed(latents, only("join"), f"given.dropout={dropout}")
    buckets = [BucketConfig(frames, 64, 64, 1) for frames in (1, 81)]
    wanted = needed_segments(replace(config, data=replace(config.data, buckets=buckets)), manifest)
    ends = (5, 13, 29, 0) if dropout else (5, 13, 29)
    assert set(wanted) == {shown_name(*lengths) for lengths in product(ends, ends)}
