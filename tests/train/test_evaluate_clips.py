"""Scores without truth records: of drawn frames only, beside true clips, with every gap named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from longtake.data.catalogue import load_catalogue
from longtake.data.loader import read_batches
from longtake.data.plan.val_plan import ValPlan
from longtake.train.clips_card import Measure, TaskScores, print_clips_card
from longtake.train.codec import load_codec
from longtake.train.config import load_config
from longtake.train.dit_task import DiTTask
from longtake.train.engine import Engine
from longtake.train.evaluate_clips import ClipsOptions, evaluate_clips, memorised
from longtake.train.fidelity import PSNR_CAP
from longtake.train.painter import Painter
from longtake.train.playback import read_footage_file
from longtake.train.runs import load_dit
from longtake.train.text_to_video import TextToVideo

from .conftest import Road
from .metric_weights import save_clip_model, save_detector
from .small_runs import write_dit_run, write_world

OPTIONS = ClipsOptions(num_shown=1, batch_size=4)
IDENTITY = (
    *("codec=identity", "model.in_channels=3", "model.out_channels=3"),
    *("model.patch_size=[1,4,4]", "tasks={t2v: 0.5, i2v: 0.5}"),
)


@pytest.fixture(scope="session")
def identity(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose latents are the pixels."""
    return write_dit_run(tmp_path_factory.mktemp("identity") / "dit", road.pixels, *IDENTITY)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "clips.parquet").to_pylist()


def measures(scores: TaskScores) -> dict[str, Measure]:
    return {measure.name: measure for measure in scores.measures}


def test_a_run_on_latents_is_measured_alike_twice(
    road: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluate_clips(road.dit, road.val, OPTIONS, tmp_path / "a", device="cpu")
    second = evaluate_clips(road.dit, road.val, OPTIONS, tmp_path / "b", device="cpu")
    assert first.card == second.card
    assert rows_of(first.folder) == rows_of(second.folder)
    t2v, i2v = first.card.tasks
    assert (t2v.task, i2v.task, t2v.num_clips, i2v.num_clips) == ("t2v", "i2v", 8, 8)
    common = ["loss", "flicker", "distance", "memorised"]
    assert list(measures(t2v)) == common
    assert list(measures(i2v)) == ["loss", "psnr", "ssim", *common[1:]]
    found = measures(i2v)["psnr"]
    assert found.held is not None and found.codec is not None and found.drawn < found.held
    assert all(row["nearest_key"] and row["nearest_key_truth"] for row in rows_of(first.folder))
    assert first.card.about["training clips searched"] == 12
    rates = {row["fps"] for row in load_catalogue(road.latents).table.to_pylist()}
    assert {first.card.about["fps"]} == rates  # none is set in data.fps
    names = sorted(path.name for path in (first.folder / "videos").iterdir())
    assert names == [f"000.{label}.mp4" for label in ("codec", "i2v", "t2v", "truth")]
    shown = read_footage_file(first.folder / "videos" / "000.i2v.mp4")
    assert shown.frames.shape == (5, 16, 16, 3)
    print_clips_card(first.card)
    printed = capsys.readouterr().out
    assert "PSNR" in printed and "not measured: FVD: give --fvd-weights" in printed
    assert "not measured: CLIP score: give --clip-model" in printed
    tree = json.loads((first.folder / "clips_card.json").read_text())
    assert tree["tasks"]["i2v"]["clips"] == 8 and tree["tasks"]["i2v"]["psnr"]["held"] == found.held
    assert tree["not_measured"] == list(first.card.not_measured)


def test_another_seed_draws_other_clips(identity: Path, road: Road, tmp_path: Path) -> None:
    few = replace(OPTIONS, num_clips=2, tasks=("t2v",), memorisation=False, num_shown=0)
    one, two = (
        evaluate_clips(identity, road.val, replace(few, seed=s), tmp_path / f"{s}", device="cpu")
        for s in (0, 1)
    )
    assert measures(one.card.tasks[0])["flicker"] != measures(two.card.tasks[0])["flicker"]
    assert measures(one.card.tasks[0])["loss"] == measures(two.card.tasks[0])["loss"]
    assert one.card.about["seed"] == 0 and list((one.folder / "videos").iterdir()) == []
    assert "behind the first 2: 6" in one.card.left_out
    assert any("--no-memorisation" in line for line in one.card.not_measured)
    assert any(line.startswith("PSNR, SSIM") for line in one.card.not_measured)


def test_the_loss_is_that_of_validation(road: Road, tmp_path: Path) -> None:
    """Numbers behind the captions included."""
    told = "numbers.sources={fps: fps, motion: motion_score}"
    identity = write_dit_run(tmp_path / "dit", road.pixels, *IDENTITY, told)
    options = replace(OPTIONS, tasks=("t2v",), memorisation=False)
    result = evaluate_clips(identity, road.val, options, tmp_path / "out", device="cpu")
    run = load_dit(identity)
    codec = load_codec(run.config, folder=identity)
    task = DiTTask(run.config, torch.device("cpu"), codec)
    task.module = TextToVideo(run.dit, run.text, run.config.text.max_length)
    data = replace(run.config.data, val=[replace(run.config.data.val[0], path=str(road.val))])
    plan = ValPlan.from_config(data, run.config.seed, 256)
    batches = read_batches(plan.tables, data, plan.micro_batches(0, 1))
    sums = task.validate(cast(Engine, task.module), batches).sums  # it only calls the engine
    wanted = sums["loss"][0] / sums["loss"][1]
    assert measures(result.card.tasks[0])["loss"].drawn == pytest.approx(wanted, rel=1e-5)


def draw_instead(
    monkeypatch: pytest.MonkeyPatch, truth: dict[str, Tensor], change: Any = lambda x: x
) -> None:
    """Let the run draw what `truth` holds for a caption, changed."""

    def draw(self: Painter, prompts: list[str], *_: object, **__: object) -> Tensor:
        return torch.stack([change(truth[prompt].clone()) for prompt in prompts])

    monkeypatch.setattr(Painter, "draw", draw)


def pixels_by_caption(run: Path, shards: Path) -> dict[str, Tensor]:
    """(3, T, H, W) in [-1, 1] of every clip."""
    config = load_config(run / "config.yaml")
    data = replace(config.data, val=[replace(config.data.val[0], path=str(shards))])
    plan = ValPlan.from_config(data, 0, 256)
    found = {}
    for batch in read_batches(plan.tables, data, plan.micro_batches(0, 1)):
        for clip, pixels in zip(batch.clips, batch.stack_video(), strict=True):
            found[clip.caption] = pixels
    return found


def test_only_drawn_frames_count(
    identity: Path, road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = pixels_by_caption(identity, road.val)
    options = replace(OPTIONS, tasks=("i2v",), memorisation=False, num_shown=0)

    def spoil_given(pixels: Tensor) -> Tensor:
        pixels[:, 0] = 1.0
        return pixels

    def spoil_drawn(pixels: Tensor) -> Tensor:
        pixels[:, 1:] += 0.2  # 0.1 of the range from 0 to 1, clamped where it is bright
        return pixels.clamp(-1, 1)

    found = []
    for name, change in (("given", spoil_given), ("drawn", spoil_drawn)):
        draw_instead(monkeypatch, truth, change)
        result = evaluate_clips(identity, road.val, options, tmp_path / name, device="cpu")
        found.append(measures(result.card.tasks[0]))
    assert found[0]["psnr"].drawn == found[0]["psnr"].codec == PSNR_CAP
    assert found[0]["ssim"].drawn == pytest.approx(1, abs=1e-5)
    assert found[1]["psnr"].drawn == pytest.approx(20, abs=0.5)
    flicker = found[0]["flicker"]
    assert flicker.truth is not None and flicker.drawn > flicker.truth  # the first frame flashes


def test_a_memorised_sample_is_found(
    identity: Path, road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    val = pixels_by_caption(identity, road.val)
    trained = pixels_by_caption(identity, road.pixels)
    copy = next(pixels for caption, pixels in trained.items() if caption not in val)
    stolen = next(iter(val))
    draw_instead(monkeypatch, {**val, stolen: copy})
    options = replace(OPTIONS, tasks=("t2v",), num_shown=0)
    result = evaluate_clips(identity, road.val, options, tmp_path / "out", device="cpu")
    rows = rows_of(result.folder)
    (row,) = [row for row in rows if row["caption"] == stolen]
    assert row["distance"] == 0.0 and row["distance_truth"] > 0.01
    table = load_catalogue(road.pixels).table.to_pylist()
    keys = {entry["sample_id"]: entry["key"] for entry in table}
    assert keys[row["nearest_id"]] == row["nearest_key"]
    for other in rows:
        if other["caption"] != stolen:
            assert other["distance"] == other["distance_truth"]
    assert measures(result.card.tasks[0])["memorised"] == Measure("memorised", 1 / 8, 0.01)


def test_the_level_of_memorisation() -> None:
    rows = [{"distance": d / 100, "distance_truth": 1 + d / 100} for d in range(101)]
    (share,) = memorised(rows)
    assert share.drawn == 1.0
    rows = [{"distance": 1 + d / 100, "distance_truth": 1 + d / 100} for d in range(101)]
    assert memorised(rows)[0].drawn == pytest.approx(1 / 101)
    assert memorised([{}]) == []


def test_pixels_can_stand_in_for_latents(road: Road, tmp_path: Path) -> None:
    options = replace(OPTIONS, num_clips=2, tasks=("t2v",), num_shown=0)
    cached = evaluate_clips(road.dit, road.val, options, tmp_path / "a", device="cpu")
    pixels = replace(options, train=road.pixels)
    encoded = evaluate_clips(road.dit, road.val, pixels, tmp_path / "b", device="cpu")
    for one, two in zip(rows_of(cached.folder), rows_of(encoded.folder), strict=True):
        assert one["nearest_key_truth"] == two["nearest_key_truth"]
        assert one["distance_truth"] == pytest.approx(two["distance_truth"], rel=0.02)  # bf16


def test_fvd_and_clip_score_with_weights_at_hand(
    identity: Path, road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(
        *(OPTIONS,),
        tasks=("i2v",),
        memorisation=False,
        num_shown=0,
        fvd_weights=save_detector(tmp_path / "i3d.pt"),
        clip_model=save_clip_model(tmp_path / "clip"),
    )
    draw_instead(monkeypatch, pixels_by_caption(identity, road.val))
    result = evaluate_clips(identity, road.val, options, tmp_path / "out", device="cpu")
    found = measures(result.card.tasks[0])
    assert found["fvd"].drawn == pytest.approx(0, abs=1e-6)  # it drew the true clips
    assert found["clip_score"].drawn == pytest.approx(found["clip_score"].truth)
    assert result.card.not_measured == (
        "distance to the training set: leave out --no-memorisation",
    )
    assert "captions behind token 16 in the CLIP score: 8" in result.card.left_out
    with pytest.raises(ValueError, match="FVD of 3 clips: the detector has 3 features"):
        evaluate_clips(
            *(identity, road.val, replace(options, num_clips=3), tmp_path / "few"), device="cpu"
        )


def test_a_damaged_clip_is_counted(identity: Path, tmp_path: Path) -> None:
    shards = write_world(tmp_path / "val", split="val", num_clips=6)
    row = load_catalogue(shards).table.to_pylist()[2]
    with (shards / row["shard"]).open("r+b") as file:
        file.seek(row["payload_offset"] + row["payload_size"] // 2)
        file.write(b"\0\0\0\0")
    options = replace(OPTIONS, tasks=("t2v",), train=shards, num_shown=0)
    result = evaluate_clips(identity, shards, options, tmp_path / "out", device="cpu")
    assert result.card.tasks[0].num_clips == 5
    reason = f"{row['key']}: payload changed after indexing (xxh3 differs)"
    assert f"{reason}: 1" in result.card.left_out
    assert f"training clips not read: 1, first {reason}" in result.card.left_out
    assert result.card.about["training clips searched"] == 5
    # The clips are those that were searched: no level to judge by.
    assert "memorisation: 5 rows are of clips that the run was trained on" in (
        result.card.not_measured
    )


def test_captions_of_one_kind_and_a_filter(identity: Path, road: Road, tmp_path: Path) -> None:
    options = replace(
        OPTIONS, tasks=("t2v",), where="family = 'move'", caption_kind="dense", num_shown=0
    )
    result = evaluate_clips(identity, road.val, options, tmp_path / "out", device="cpu")
    table = load_catalogue(road.val).table.to_pylist()
    keys = {row["key"] for row in table if row["family"] == "move"}
    assert {row["key"] for row in rows_of(result.folder)} == keys
    dropped = f"dropped, where family = 'move': {8 - len(keys)}"
    assert result.card.left_out == (dropped, f"captions behind text.max_length=64: {len(keys)}")
    assert result.card.about["captions"] == {"dense": 1.0}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (ClipsOptions(tasks=("outpaint",)), "task outpaint: the run was trained on t2v, i2v"),
        (ClipsOptions(where="frames > 99"), "frames > 99"),
        (ClipsOptions(where="colour = 3"), "colour"),
        (ClipsOptions(caption_kind="poetic"), "no caption of kind poetic': 8"),
        (ClipsOptions(fps=1.0), "clip shorter than every bucket': 8"),
        (ClipsOptions(fvd_weights=Path("absent.pt")), "--fvd-weights absent.pt: no such file"),
        (ClipsOptions(clip_model=Path("absent")), "--clip-model absent: no such folder"),
        (ClipsOptions(train=Path("absent")), "absent: no such folder.*--train-shards"),
    ],
)
def test_mistakes_are_named(
    identity: Path, road: Road, tmp_path: Path, options: ClipsOptions, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        evaluate_clips(identity, road.val, options, tmp_path / "out", device="cpu")
    assert not list(tmp_path.iterdir())


def test_latents_are_no_clips(road: Road, identity: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds latents; give the shards of clips"):
        evaluate_clips(road.dit, road.latents, OPTIONS, tmp_path / "out", device="cpu")
    with pytest.raises(ValueError, match="a run with codec=identity has none"):
        options = replace(OPTIONS, train=road.latents)
        evaluate_clips(identity, road.val, options, tmp_path / "out", device="cpu")


def test_images_have_nothing_behind_a_given_frame(road: Road, tmp_path: Path) -> None:
    image = "data.buckets=[{frames:1,height:16,width:16,batch_size:2}]"
    run = write_dit_run(tmp_path / "dit", road.pixels, *IDENTITY, image)
    result = evaluate_clips(run, road.val, OPTIONS, tmp_path / "out", device="cpu")
    assert [scores.task for scores in result.card.tasks] == ["t2v"]
    assert "task i2v: it needs 2 latent frames, this clip has 1: 8" in result.card.left_out
    assert "flicker: no clip has three frames" in result.card.not_measured
    assert (result.folder / "videos" / "000.t2v.png").is_file()
    with pytest.raises(ValueError, match=r"nothing was drawn: .*task i2v: it needs 2"):
        options = replace(OPTIONS, tasks=("i2v",))
        evaluate_clips(run, road.val, options, tmp_path / "none", device="cpu")
