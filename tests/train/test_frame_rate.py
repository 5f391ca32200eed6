"""What is drawn plays as fast as what was trained on, whoever asks for it."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from longtake.data.decode import probe
from longtake.train.encode import encode_shards
from longtake.train.evaluate import EvaluateOptions, evaluate_run, resolve
from longtake.train.evaluate_clips import ClipsOptions, evaluate_clips
from longtake.train.export import export_run
from longtake.train.frame_rate import DEFAULT_FPS, drawn_rate, warn_of_default
from longtake.train.painter import Painter
from longtake.train.runs import load_dit
from longtake.train.sample import SampleRequest, sample_to_files
from longtake.train.schema import DiTRun

from .conftest import Road, small_text
from .small_runs import FAMILIES, four_steps, write_dit_run, write_world
from .tiny_runs import train_here

TOLD = "numbers.sources.fps=fps"


@pytest.fixture(scope="module")
def slow(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on cached latents of 4 frames per second; data.fps is null."""
    root = tmp_path_factory.mktemp("slow")
    pixels = write_world(root / "pixels", fps=4)
    encode_shards(road.vae, pixels, root / "latents", small_text())
    return write_dit_run(root / "dit", root / "latents", TOLD)


def test_the_catalogue_knows_the_rate_of_cached_latents(
    slow: Path, road: Road, tmp_path: Path
) -> None:
    (path,) = sample_to_files(slow, SampleRequest(["a"]), tmp_path / "drawn", device="cpu")
    assert probe(path.read_bytes()).fps == 4
    assert json.loads(path.with_suffix(".json").read_text())["fps"] == 4
    config = load_dit(slow).config
    options = EvaluateOptions(families=FAMILIES, num_prompts=1)
    assert {one.fps for one in resolve(config, options, 2).values()} == {4}
    report = export_run(slow, tmp_path / "pipeline")
    assert "at 4 frames per second" in (report.out / "README.md").read_text()
    options = ClipsOptions(num_clips=2, memorisation=False, num_shown=0)
    own = Path(config.data.train[0].path).parent / "pixels"
    result = evaluate_clips(slow, own, options, tmp_path / "clips", device="cpu")
    assert result.card.about["fps"] == 4  # also where the training set is not searched


def test_evaluation_tells_what_training_told(
    slow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both kinds of it, as `longtake sample` does."""
    told: list[Any] = []
    draw = Painter.draw

    def keep(self: Painter, *args: Any, **settings: Any) -> Tensor:
        told.extend(settings["numbers"])
        return draw(self, *args, **settings)

    monkeypatch.setattr(Painter, "draw", keep)
    few = EvaluateOptions(splits=("val",), num_prompts=1, num_shown=0, weights=("ema",), steps=1)
    evaluate_run(slow, few, tmp_path / "world")
    own = Path(load_dit(slow).config.data.train[0].path).parent / "pixels"
    options = ClipsOptions(num_clips=2, memorisation=False, num_shown=0, steps=1)
    evaluate_clips(slow, own, options, tmp_path / "clips", device="cpu")
    sample_to_files(slow, SampleRequest(["a"], steps=1), tmp_path / "drawn", device="cpu")
    assert len(told) > 3 and all(one == {"fps": 4} for one in told)


def test_who_says_more_is_heard(slow: Path) -> None:
    config = load_dit(slow).config

    def changed(**data: object) -> DiTRun:
        return replace(config, data=replace(config.data, **data))

    assert drawn_rate(changed(fps=6.0), 5) == 6
    gone = replace(config.data.train[0], path="gone")
    warn_of_default.cache_clear()
    with pytest.warns(UserWarning, match=r"videos are drawn .* 8 frames .* set data.fps"):
        assert drawn_rate(changed(train=[gone]), 5) == DEFAULT_FPS
    assert drawn_rate(config, 1) == 0


@pytest.mark.parametrize(("fps", "count"), [("null", 1), ("4", 0)])
def test_a_run_says_once_that_no_rate_is_told(tmp_path: Path, fps: str, count: int) -> None:
    """Its clips have several."""
    folders = [write_world(tmp_path / f"at{rate}", frames=9, fps=rate) for rate in (4, 8)]
    listed = ", ".join(f"{{path: {folder}, captions: {{short: 1}}}}" for folder in folders)
    identity = "codec=identity", "model.in_channels=3", "model.out_channels=3"
    asked = "evaluation.every=1", "evaluation.families=[move]", "evaluation.num_prompts=1"
    run = four_steps(folders[0], tmp_path / "run", 5, ["t2v"], *identity, *asked)
    data = [f"data.train=[{listed}]", f"data.fps={fps}", "train.steps=1"]
    run = [one for one in run if not one.startswith("data.train.0.path")]
    warn_of_default.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert train_here([*run, *data]) == 0
    said = [one for one in caught if "set data.fps" in str(one.message)]
    assert len(said) == count


def test_images_are_told_no_rate(road: Road, tmp_path: Path) -> None:
    pixels = write_world(tmp_path / "images", frames=1)
    image = "data.buckets=[{frames:1,height:16,width:16,batch_size:2}]"
    identity = ("codec=identity", "model.in_channels=3", "model.out_channels=3", image, TOLD)
    run = write_dit_run(tmp_path / "dit", pixels, *identity, "tasks={t2v: 0, t2i: 1, i2v: 0}")
    request = SampleRequest(["a"], task="t2i")
    (path,) = sample_to_files(run, request, tmp_path / "drawn", device="cpu")
    assert json.loads(path.with_suffix(".json").read_text())["fps"] == 0
