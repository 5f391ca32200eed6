"""Validation of a VAE by the world's scorers and by rFVD: right where truth is shown, or silent."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longtake.data.config import shape_name
from longtake.data.plan.planned import PlannedSample
from longtake.data.plan.val_plan import ValPlan
from longtake.data.reader import Clip
from longtake.data.world import make_clip
from longtake.launch.compose import compose
from longtake.train.main import run
from longtake.train.playback import to_pixels
from longtake.train.ranks import single_process
from longtake.train.schema import VAERun
from longtake.train.vae_judges import ReconstructionDistance, world_scores
from longtake.train.vae_task import VAETask
from tests.train.metric_weights import save_detector
from tests.train.small_runs import BUCKET, COMMON, FRAMES, SIDE, VAE_SIZES, write_world
from tests.train.tiny_runs import losses, tree

SHAPE = FRAMES, SIDE, SIDE
NAME = shape_name(SHAPE)


def clip_of(index: int) -> Clip:
    """A clip of the world as the loader hands it over."""
    world = make_clip(0, "val", index, families=["move"], frames=FRAMES, height=SIDE, width=SIDE)
    sample = PlannedSample(
        *(0, index, index, world.key, 0, SHAPE, (0.0,), 8.0, (0.5, 0.5), False, "short"),
        *(index, 0, (0, 0)),
    )
    video = torch.from_numpy(world.frames.copy()).permute(3, 0, 1, 2)
    return Clip(sample, world.captions["short"], 8.0, video=video, truth=world.truth)


def options(folder: Path, *more: str) -> list[str]:
    """Overrides of a run of one step that validates all clips."""
    data = f"data.train.0.path={folder}/world", f"data.val.0.path={folder}/world"
    run_in = f"output_dir={folder}/run", "validation.num_videos=0", "validation.score_share=1"
    return ["stage=vae", *COMMON, *VAE_SIZES, *data, *run_in, *more]


def config_of(folder: Path, *more: str) -> VAERun:
    config = compose(options(folder, *more))
    assert isinstance(config, VAERun)
    return config


def test_a_perfect_reconstruction_scores_one_and_a_grey_one_does_not() -> None:
    clip = clip_of(0)
    assert clip.truth is not None and clip.video is not None
    perfect = world_scores(clip, to_pixels(clip.video.permute(1, 2, 3, 0).numpy()))
    assert perfect == {f"world/move/{name}": 1.0 for name in clip.truth["expect"]}
    assert world_scores(clip, torch.zeros(3, *SHAPE))["world/move/colour"] == 0


def test_only_what_the_truth_record_describes_is_scored() -> None:
    clip, pixels = clip_of(0), torch.zeros(3, *SHAPE)
    assert clip.truth is not None
    cut = replace(clip, sample=replace(clip.sample, shape=(FRAMES, SIDE, SIDE // 2)))
    assert world_scores(cut, pixels) == {}
    assert world_scores(replace(clip, truth=None), pixels) == {}
    assert world_scores(replace(clip, truth={"defects": [{"type": "freeze"}]}), pixels) == {}
    spoiled = replace(clip, truth=clip.truth | {"defects": [{"type": "freeze"}]})
    assert world_scores(spoiled, pixels) == {}


def test_validation_reports_scores_per_bucket_and_rfvd(tmp_path: Path) -> None:
    write_world(tmp_path / "world", num_clips=6)
    detector = f"validation.fvd_weights={save_detector(tmp_path / 'i3d.pt')}"
    assert run(tree(options(tmp_path, detector, "train.val_every=1"))) == 0
    of_bucket = "world/move/colour", "rfvd", "latent_fine"
    found = {
        name: losses(tmp_path / "run", f"val/{name}")
        for name in ("world", "world/leftright/relation", "rfvd_ema", *of_bucket)
    }
    assert all(values.keys() == {0, 1} for values in found.values())
    for name in of_bucket:
        assert losses(tmp_path / "run", f"val/{name}/{NAME}") == found[name]
    assert min(found["rfvd"].values()) > 0


def test_rfvd_is_zero_for_equal_clips_and_grows_with_the_difference(tmp_path: Path) -> None:
    detector = str(save_detector(tmp_path / "i3d.pt"))
    distance = ReconstructionDistance(config_of(tmp_path), detector, single_process())
    clips = torch.rand(6, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    distance.add(clips, clips)
    distance.add(clips[:, :, :1], 1 - clips[:, :, :1])  # images do not count
    assert distance.values() == pytest.approx({"rfvd": 0, f"rfvd/{NAME}": 0}, abs=1e-9)
    distance.clear()
    distance.add(clips * 0.5, clips)
    assert distance.values()["rfvd"] > 0.1


def test_rfvd_of_a_bucket_is_that_of_its_clips_alone(tmp_path: Path) -> None:
    detector = str(save_detector(tmp_path / "i3d.pt"))
    distance = ReconstructionDistance(config_of(tmp_path), detector, single_process())
    clips = torch.rand(6, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    distance.add(clips * 0.5, clips)
    alone = distance.values()[f"rfvd/{NAME}"]
    distance.add(clips[:3, ..., 1:], clips[:3, ..., 1:])  # as many clips as features: too few
    found = distance.values()
    assert found.keys() == {"rfvd", f"rfvd/{NAME}"}
    assert found[f"rfvd/{NAME}"] == alone > found["rfvd"] > 0


def test_what_is_not_measured_is_said_and_what_cannot_be_is_refused(tmp_path: Path) -> None:
    gaps = VAETask(config_of(tmp_path), single_process()).not_measured()
    assert [gap.split(": set ")[0] for gap in gaps] == ["LPIPS", "rFVD"]
    assert "validation.fvd_weights" in gaps[1]
    with pytest.raises(ValueError, match=r"validation\.fvd_weights absent\.pt: no such file"):
        VAETask(config_of(tmp_path, "validation.fvd_weights=absent.pt"), single_process())
    detector = f"validation.fvd_weights={save_detector(tmp_path / 'i3d.pt')}"
    with pytest.raises(ValueError, match=r"FVD of 3 clips.*leave out validation\.fvd_weights"):
        VAETask(config_of(tmp_path, detector, "validation.num_samples=3"), single_process())


def test_rfvd_of_images_is_refused_at_the_start(tmp_path: Path) -> None:
    detector = f"validation.fvd_weights={save_detector(tmp_path / 'i3d.pt')}"
    still = f"{{frames:1,height:{SIDE},width:{SIDE},batch_size:2}}"
    with pytest.raises(ValueError, match=r"fvd_weights=.* data\.buckets has images only"):
        VAETask(config_of(tmp_path, detector, f"data.buckets=[{still}]"), single_process())


def test_only_videos_count_for_rfvd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_world(tmp_path / "world", num_clips=6)
    write_world(tmp_path / "stills", num_clips=6, frames=1)
    both = f"[{{path:{tmp_path}/world}},{{path:{tmp_path}/stills}}]"
    mixed = (
        f"validation.fvd_weights={save_detector(tmp_path / 'i3d.pt')}",
        f"data.buckets=[{BUCKET},{{frames:1,height:{SIDE},width:{SIDE},batch_size:2}}]",
        f"data.train={both}",
        f"data.val={both}",
        "validation.num_samples=6",
    )
    assert run(tree(options(tmp_path, *mixed))) == 1
    said = capsys.readouterr().err
    assert "validation.num_samples=6 takes 3 videos and 3 images of data.val" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    config = config_of(tmp_path, *mixed, "validation.num_samples=8")
    distance = VAETask(config, single_process()).distance
    assert distance is not None
    distance.check_pass(ValPlan.from_config(config.data, config.seed, 8))


def test_a_bucket_of_few_videos_goes_without_rfvd_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_world(tmp_path / "world", num_clips=6)
    write_world(tmp_path / "wide", num_clips=4, width=2 * SIDE)
    both = f"[{{path:{tmp_path}/world}},{{path:{tmp_path}/wide}}]"
    wide = f"{{frames:{FRAMES},height:{SIDE},width:{2 * SIDE},batch_size:2}}"
    name = shape_name((FRAMES, SIDE, 2 * SIDE))
    detector = f"validation.fvd_weights={save_detector(tmp_path / 'i3d.pt')}"
    mixed = f"data.buckets=[{BUCKET},{wide}]", f"data.train={both}", f"data.val={both}"
    few = "validation.num_samples=7"  # four of the one, three of the other
    assert run(tree(options(tmp_path, detector, *mixed, few))) == 0
    said = capsys.readouterr().out
    assert said.count(f"rFVD of {name} (3 videos) by itself: a bucket needs more than 3") == 1
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert f'"val/rfvd/{NAME}"' in logged and f'"val/psnr/{name}"' in logged
    assert f"val/rfvd/{name}" not in logged
