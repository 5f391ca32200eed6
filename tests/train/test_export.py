"""The exported folder is a stock pipeline that draws what we draw; the rest is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.models.dit import DiT
from longtake.train import export
from longtake.train.config import check_exportable
from longtake.train.export import export_run
from longtake.train.runs import load_dit

from .conftest import Road
from .small_runs import write_dit_run


@pytest.fixture(scope="module")
def exported(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "pipeline"
    report = export_run(road.dit, out)
    assert set(report.worst) == {"t2v", "i2v"}
    assert max(report.worst.values()) < 1e-3
    return out


def test_diffusers_alone_loads_and_draws(exported: Path) -> None:
    import diffusers

    pipeline: Any = diffusers.DiffusionPipeline  # pyright: ignore
    pipeline = pipeline.from_pretrained(exported)
    assert type(pipeline).__name__ == "WanPipeline"
    index = json.loads((exported / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "UMT5EncoderModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKLWan"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2}
    video: Any = pipeline(prompt="a red circle", max_sequence_length=64, **options)
    assert video.frames.shape == (1, 5, 16, 16, 3)


def test_the_card_has_what_a_user_needs(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "max_sequence_length=64" in card
    assert "WanImageToVideoPipeline" in card
    assert "CC0-1.0 (12)" in card and "sampler: flow-match Euler with shift" in card
    manifest = json.loads((exported / "data_manifest.json").read_text())
    assert manifest[0]["samples"] == 12 and manifest[0]["fingerprint"]


def test_an_existing_folder_is_kept(road: Road, exported: Path) -> None:
    with pytest.raises(ValueError, match="--overwrite"):
        export_run(road.dit, exported)


def test_a_pipeline_that_draws_otherwise_is_not_left_behind(
    road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_noise(dit: DiT) -> torch.nn.Module:
        theirs = original(dit)
        with torch.no_grad():
            theirs.proj_out.bias.add_(0.5)
        return theirs

    original = export.dit_to_diffusers
    monkeypatch.setattr(export, "dit_to_diffusers", with_noise)
    with pytest.raises(ValueError, match="nothing was written"):
        export_run(road.dit, tmp_path / "pipeline")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("prediction=clean",), "prediction=clean"),
        (("model.absolute_positions=6",), r"absolute_positions=6\.0"),
        (("data.buckets=[{frames:5,height:24,width:16,batch_size:2}]",), "5x24x16"),
    ],
)
def test_what_has_no_stock_form_is_refused(
    road: Road, tmp_path: Path, overrides: tuple[str, ...], reason: str
) -> None:
    run = write_dit_run(tmp_path / "dit", road.latents, *overrides)
    with pytest.raises(ValueError, match=reason):
        check_exportable(load_dit(run).config)


def test_videos_are_verified_where_images_come_first(road: Road, tmp_path: Path) -> None:
    buckets = ", ".join(f"{{frames:{n},height:16,width:16,batch_size:2}}" for n in (1, 5))
    tasks = f"data.buckets=[{buckets}]", "tasks={t2v: 1, t2i: 1, i2v: 0}"
    run = write_dit_run(tmp_path / "dit", road.latents, *tasks)
    report = export_run(run, tmp_path / "pipeline")
    assert set(report.worst) == {"t2v"}
    assert "num_frames=5" in (report.out / "README.md").read_text()


def test_text_to_video_alone_is_said(road: Road, tmp_path: Path) -> None:
    run = write_dit_run(tmp_path / "dit", road.latents, "model.patch_size=[1,1,1]")
    report = export_run(run, tmp_path / "pipeline")
    assert set(report.worst) == {"t2v"}
    assert "text to video only" in str(report)


def test_what_guidance_leads_away_from_goes_along(road: Road, tmp_path: Path) -> None:
    """Verification draws with it on both sides, and the card tells it, as it does the solver."""
    overrides = "samples.negative_prompt='blurry, grey'", "samples.guidance_scale=6"
    run = write_dit_run(tmp_path / "dit", road.latents, *overrides, "samples.solver=unipc")
    report = export_run(run, tmp_path / "pipeline")
    assert set(report.worst) == {"t2v", "i2v"}
    card = (report.out / "README.md").read_text()
    assert card.count("negative_prompt='blurry, grey'") == 2
    assert "sampler: UniPC with shift" in card
