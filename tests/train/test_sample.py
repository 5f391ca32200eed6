"""Drawing: the same video for the same seed, in any batch; files that play; images kept."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from longtake.data.decode import encode_image, encode_video, probe
from longtake.train import sample
from longtake.train.codec import load_codec
from longtake.train.evaluate import EvaluateOptions
from longtake.train.evaluate_clips import ClipsOptions
from longtake.train.painter import GivenClips, Painter, noise_for, sampler_of
from longtake.train.playback import read_footage_file, to_frames
from longtake.train.runs import load_dit
from longtake.train.sample import SampleRequest, sample_to_files, slug

from .conftest import Road
from .small_runs import FRAMES, SIDE, write_dit_run, write_vae_run

PROMPTS = ("a red circle moves left", "a blue square moves up", "two things")


def test_files_play_and_say_what_they_are(road: Road, tmp_path: Path) -> None:
    request = SampleRequest(PROMPTS[:2], num_videos=2, seed=3)
    paths = sample_to_files(road.dit, request, tmp_path, device="cpu")
    assert len(paths) == 4 and len({p.name for p in paths}) == 4
    info = probe(paths[0].read_bytes())
    assert (info.frames, info.height, info.width, info.codec) == (FRAMES, 256, 256, "h264")
    about = json.loads(paths[3].with_suffix(".json").read_text())
    assert about["prompt"] == PROMPTS[1] and about["video"] == 1 and about["steps"] == 3


def test_a_video_does_not_depend_on_its_batch(
    road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As drawn: the codec would make a few levels of what rounds the other way."""
    drawn: list[np.ndarray] = []

    def keep(frames: np.ndarray, fps: float) -> bytes:
        drawn.append(frames.astype(int))
        return encode_video(frames, fps)

    monkeypatch.setattr(sample, "encode_video", keep)
    for size in (1, 3):
        request = SampleRequest(PROMPTS, batch_size=size, upscale=1)
        sample_to_files(road.dit, request, tmp_path / str(size), device="cpu")
    half = len(drawn) // 2
    assert half == len(PROMPTS)
    for alone, together in zip(drawn[:half], drawn[half:], strict=True):
        assert alone.shape == (FRAMES, SIDE, SIDE, 3)
        assert np.abs(alone - together).max() <= 1


def test_seed_and_prompt_change_the_video(road: Road) -> None:
    run = load_dit(road.dit)
    codec = load_codec(run.config, folder=road.dit)
    painter = Painter(run, codec, sampler_of(run.config))
    shape = codec.latent_shape(FRAMES, SIDE, SIDE)
    noise = torch.stack([noise_for(0, shape), noise_for(0, shape), noise_for(1, shape)])
    same, other_prompt, other_seed = painter.draw([PROMPTS[0], PROMPTS[1], PROMPTS[0]], noise)
    assert not torch.equal(same, other_prompt)
    assert not torch.equal(same, other_seed)
    again = painter.draw([PROMPTS[0]], noise[:1])[0]
    torch.testing.assert_close(again, same, rtol=0, atol=1e-5)


def test_the_first_frame_is_kept(road: Road, tmp_path: Path) -> None:
    run = load_dit(road.dit)
    codec = load_codec(run.config, folder=road.dit)
    painter = Painter(run, codec, sampler_of(run.config))
    clip = torch.rand(1, 3, FRAMES, SIDE, SIDE) * 2 - 1
    first, shape = clip[:, :, :1], codec.latent_shape(FRAMES, SIDE, SIDE)
    given = GivenClips(clip, codec.given("i2v", shape[1], 1))
    video = painter.draw([PROMPTS[0]], noise_for(0, shape)[None], given)
    alone = codec.decode(codec.encode(first))
    torch.testing.assert_close(video[:, :, :1], alone, rtol=0, atol=1e-4)
    picture = tmp_path / "first.png"
    picture.write_bytes(encode_image(to_frames(first[0])[0]))
    request = SampleRequest(PROMPTS[:1], task="i2v", given=[str(picture)])
    assert sample_to_files(road.dit, request, tmp_path / "out", device="cpu")


def test_mistakes_are_named(road: Road, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        sample_to_files(road.dit, SampleRequest(PROMPTS, task="i2v", given=["no.png"]), tmp_path)
    with pytest.raises(ValueError, match="stage=vae must be dit"):
        sample_to_files(road.vae, SampleRequest(PROMPTS), tmp_path)
    with pytest.raises(ValueError, match="4 frames"):
        sample_to_files(road.dit, SampleRequest(PROMPTS, frames=4), tmp_path)
    with pytest.raises(ValueError, match="patch_size"):
        sample_to_files(road.dit, SampleRequest(PROMPTS, size=(18, 18)), tmp_path)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("given_noise", (-0.1, 1.0, math.nan)),
        ("fps", (0.0, -8.0, math.nan, math.inf)),
        ("num_videos", (0, -1)),
        ("batch_size", (0,)),
    ],
)
def test_values_that_mean_nothing_are_refused_by_name(name: str, values: tuple[float, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"{name}={value} must"):
            SampleRequest(PROMPTS, **{name: value})  # pyright: ignore[reportArgumentType]


def test_numbers_that_mean_nothing_are_refused_by_name() -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"numbers.motion={value} must be finite"):
            SampleRequest(PROMPTS, numbers={"motion": value})


def test_what_evaluates_refuses_them_too() -> None:
    with pytest.raises(ValueError, match="batch_size=0 must"):
        EvaluateOptions(batch_size=0)
    with pytest.raises(ValueError, match="fps=0 must"):
        ClipsOptions(fps=0)


def test_an_unknown_solver_is_named(road: Road, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sampler\.solver=heun must be one of euler, unipc"):
        sample_to_files(road.dit, SampleRequest(PROMPTS, solver="heun"), tmp_path, device="cpu")


def test_i2v_needs_a_run_that_was_trained_on_it(road: Road, tmp_path: Path) -> None:
    run = write_dit_run(tmp_path / "dit", road.latents, "tasks.i2v=0")
    picture = tmp_path / "first.png"
    picture.write_bytes(encode_image(np.zeros((SIDE, SIDE, 3), np.uint8)))
    with pytest.raises(ValueError, match=r"tasks\.i2v=0"):
        sample_to_files(
            run, SampleRequest(PROMPTS[:1], task="i2v", given=[str(picture)]), tmp_path / "out"
        )


def test_the_vae_of_other_latents_is_refused(road: Road, tmp_path: Path) -> None:
    other = write_vae_run(tmp_path / "vae", road.pixels, "vae.base_dim=4")
    run = load_dit(road.dit)
    with pytest.raises(ValueError, match="encode again"):
        load_codec(run.config, folder=road.dit, vae=other)


def test_captions_cut_to_another_length_are_refused(road: Road, tmp_path: Path) -> None:
    run = write_dit_run(tmp_path / "dit", road.latents, "text.max_length=32")
    with pytest.raises(ValueError, match=r"text\.max_length=32 must be the 64"):
        load_codec(load_dit(run).config, folder=run)


def test_a_cut_prompt_is_named(road: Road, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    long = "a red circle " * 20
    sample_to_files(road.dit, SampleRequest([long]), tmp_path, device="cpu")
    assert "text.max_length=64" in capsys.readouterr().err


def test_identity_codec_draws_without_a_vae(road: Road, tmp_path: Path) -> None:
    sizes = ("codec=identity", "model.in_channels=3", "model.out_channels=3")
    run = write_dit_run(
        *(tmp_path / "dit", road.pixels, *sizes, "prediction=clean", "model.patch_size=[1,4,4]")
    )
    (path,) = sample_to_files(run, SampleRequest(PROMPTS[:1], upscale=1), tmp_path / "out")
    assert read_footage_file(path).frames.shape == (FRAMES, SIDE, SIDE, 3)


def test_videos_are_drawn_where_images_come_first(road: Road, tmp_path: Path) -> None:
    sizes = ("codec=identity", "model.in_channels=3", "model.out_channels=3")
    buckets = ", ".join(f"{{frames:{n},height:16,width:16,batch_size:2}}" for n in (1, 5))
    run = write_dit_run(
        *(tmp_path / "dit", road.pixels, *sizes, "model.patch_size=[1,4,4]"),
        *(f"data.buckets=[{buckets}]", "tasks={t2v: 1, t2i: 1, i2v: 1}"),
    )
    picture = tmp_path / "first.png"
    picture.write_bytes(encode_image(np.zeros((SIDE, SIDE, 3), np.uint8)))
    for task, given in (("t2v", []), ("i2v", [str(picture)])):
        request = SampleRequest(PROMPTS[:1], task=task, given=given, upscale=1)
        (path,) = sample_to_files(run, request, tmp_path / task, device="cpu")
        assert probe(path.read_bytes()).frames == FRAMES
    request = SampleRequest(PROMPTS[:1], task="t2i")
    (path,) = sample_to_files(run, request, tmp_path / "t2i", device="cpu")
    assert path.suffix == ".png"
    with pytest.raises(ValueError, match="none is fit for join: task join: it needs 5"):
        request = SampleRequest(PROMPTS[:1], task="join")
        sample_to_files(road.dit, request, tmp_path / "join", device="cpu")


def test_slug() -> None:
    assert slug("A red circle, moving LEFT!") == "a-red-circle-moving-left"
    assert slug("一个") == "prompt"
