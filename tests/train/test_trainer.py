"""The training loop on world shards: resume, kills, signals, ranks and engines, bad samples."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longtake.data.decode import probe
from longtake.train import dit_drawing
from longtake.train.run_folder import (
    RUNNING,
    FolderLock,
    check_replaceable,
    mark,
    read_marker,
)
from longtake.train.tasks import Drawing
from tests.train.forked import import_before_fork, run_ranks
from tests.train.small_runs import write_world
from tests.train.tiny_runs import (
    TINY_VAE,
    kill_group,
    kill_or_leave,
    losses,
    options,
    start_command,
    train_here,
    train_on_rank,
    wait_for,
    write_clips,
    write_splits,
)

STEPS = list(range(1, 13))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("shards"), 40, 8)


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the uninterrupted run on one process."""
    folder = tmp_path_factory.mktemp("whole")
    assert train_here(options(shards, folder)) == 0
    assert read_marker(folder) == "FINISHED"
    found = losses(folder)
    assert list(found) == STEPS
    return found


def close_to(expected: dict[int, float], tolerance: float) -> dict[int, object]:
    return {step: pytest.approx(loss, rel=tolerance) for step, loss in expected.items()}


def test_killed_and_resumed_it_sees_the_same_losses(
    shards: Path, whole: dict[int, float], tmp_path: Path
) -> None:
    """SIGKILL at a step between two checkpoints; the same command goes on, bit for bit."""
    command = options(shards, tmp_path)
    rows = tmp_path / "metrics.jsonl"
    process = start_command(command, cwd=tmp_path)
    wait_for(lambda: rows.exists() and len(rows.read_text().splitlines()) >= 5, process, 120)
    kill_group(process)
    process.wait()
    assert read_marker(tmp_path) == "RUNNING"
    seen = losses(tmp_path)
    assert 5 <= max(seen) < 12
    assert train_here(command) == 0
    attempts = [json.loads(line)["attempt"] for line in rows.read_text().splitlines()]
    assert set(attempts) == {1, 2}
    assert losses(tmp_path) == whole
    assert seen.items() <= whole.items()
    assert read_marker(tmp_path) == "FINISHED"


def test_a_signal_saves_and_leaves_with_75(
    shards: Path, whole: dict[int, float], tmp_path: Path
) -> None:
    command = options(shards, tmp_path, "train.checkpoint_every=0", "output_dir=run")
    folder = tmp_path / "run"  # relative: from whatever directory the command is started in
    process = start_command(command, cwd=tmp_path)
    wait_for(lambda: 2 in losses(folder), process, 120)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75
    assert read_marker(folder) == "PREEMPTED"
    (saved,) = [path.name for path in (folder / "checkpoints").iterdir()]
    assert saved == f"step-{max(losses(folder)):08d}"
    again = start_command(command, cwd=tmp_path)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert losses(folder) == whole


@pytest.mark.dist
@pytest.mark.parametrize("engine", ["ddp", "deepspeed_zero2"])
def test_two_ranks_see_the_losses_of_one(
    engine: str, shards: Path, whole: dict[int, float], tmp_path: Path
) -> None:
    import_before_fork()
    command = options(shards, tmp_path, f"engine={engine}", "train.val_every=6")
    assert run_ranks(2, train_on_rank, command) == [0, 0]
    # bf16 autocast: sums in another order move the last bits, which training then amplifies
    assert losses(tmp_path) == close_to(whole, 2e-3)
    alone = tmp_path / "alone"
    assert train_here(options(shards, alone, "train.val_every=6", "engine.precision=fp32")) == 0
    precise = tmp_path / "precise"
    command = options(shards, precise, f"engine={engine}", "engine.precision=fp32")
    assert run_ranks(2, train_on_rank, [*command, "train.val_every=6"]) == [0, 0]
    assert losses(precise) == close_to(losses(alone), 1e-5)
    validation = losses(alone, "val/loss_ema")
    assert list(validation) == [0, 6, 12]
    assert losses(precise, "val/loss_ema") == close_to(validation, 1e-5)


@pytest.mark.dist
def test_a_run_of_two_ranks_goes_on_on_one(
    shards: Path, whole: dict[int, float], tmp_path: Path
) -> None:
    """Two ranks under ZeRO 2 reach step 8; one ddp process goes on from their checkpoint."""
    import_before_fork()
    command = options(shards, tmp_path, "engine.precision=fp32")
    zero2 = [*command, "engine=deepspeed_zero2", "engine.precision=fp32"]
    assert run_ranks(2, train_on_rank, zero2) == [0, 0]
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000012")
    two = losses(tmp_path)
    assert train_here(command) == 0
    assert losses(tmp_path) == close_to(two, 1e-4)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["attempt"], last["samples_seen"]) == (12, 2, 96)


def test_a_finished_run_stays_finished(shards: Path, tmp_path: Path) -> None:
    command = options(shards, tmp_path, "train.steps=2")
    assert train_here(command) == 0
    before = losses(tmp_path)
    assert train_here(command) == 0
    assert losses(tmp_path) == before
    assert read_marker(tmp_path) == "FINISHED"


def test_a_changed_config_is_refused_by_its_keys(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(options(shards, tmp_path, "train.steps=2")) == 0
    changed = options(shards, tmp_path, "train.steps=2", "optim.lr=0.5")
    assert train_here(changed) == 1
    message = capsys.readouterr().err
    assert "optim.lr: 0.0012 -> 0.5" in message
    assert "resume=force" in message
    assert read_marker(tmp_path) == "FINISHED"  # a refused command changes nothing
    assert train_here([*changed, "resume=never"]) == 1
    assert "resume=never" in capsys.readouterr().err
    assert train_here([*changed, "resume=force", "train.steps=3"]) == 0
    assert list(losses(tmp_path)) == [1, 2, 3]


def test_other_shards_are_refused_on_resume(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    assert train_here(options(shards, run, "train.steps=2")) == 0
    write_clips(other / "train", 24)
    shutil.copytree(shards / "val", other / "val")
    assert train_here(options(other, run, "train.steps=2")) == 1
    assert "data.train" in capsys.readouterr().err
    moved = tmp_path / "moved"  # the same shards elsewhere are welcome
    shutil.copytree(shards, moved)
    assert train_here(options(moved, run, "train.steps=2")) == 0


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("experiment=nope", "nope"),
        ("train.stepz=3", "stepz"),
        ("+train.stepz=3", "train.stepz: unknown key, did you mean train.steps?"),
        ("data.train.0.path=/nowhere", "/nowhere"),
    ],
)
def test_mistakes_end_with_code_1_and_leave_no_run(
    override: str, word: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "longtake.train", "experiment=nano_identity"]
    folder = tmp_path / "run"
    result = subprocess.run(
        [*command, override, f"output_dir={folder}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert word in result.stderr
    assert not (folder / "config.yaml").exists()
    assert read_marker(folder) is None


def damage(shards: Path, copy: Path, clips: range) -> Path:
    """A copy of the shards in which some mp4s differ from what was indexed; sizes stay."""
    shutil.copytree(shards, copy)
    tars = sorted((copy / "train").glob("*.tar"))
    for index in clips:
        data = bytearray(tars[index // 8].read_bytes())
        place = -1
        for _ in range(index % 8 + 1):
            place = data.index(b"ftyp", place + 1)
        data[place + 40] ^= 0xFF
        tars[index // 8].write_bytes(bytes(data))
    return copy


@pytest.mark.dist
def test_a_bad_sample_is_quarantined_alike_everywhere(shards: Path, tmp_path: Path) -> None:
    import_before_fork()
    broken = damage(shards, tmp_path / "broken", range(3, 4))
    one, two = tmp_path / "one", tmp_path / "two"
    fixed = "engine.precision=fp32", "data.max_bad_fraction=0.1", "tasks.i2v=1"
    assert train_here(options(broken, one, *fixed)) == 0
    (line,) = (one / "quarantine.jsonl").read_text().splitlines()
    assert "xxh3" in json.loads(line)["reason"]
    assert run_ranks(2, train_on_rank, options(broken, two, *fixed)) == [0, 0]
    assert (two / "quarantine.jsonl").read_text() == (one / "quarantine.jsonl").read_text()
    assert losses(two) == close_to(losses(one), 1e-5)
    state = json.loads((one / "checkpoints/step-00000012/train_state.json").read_text())
    assert [e["sample_id"] for e in state["exclusions"]] == [json.loads(line)["sample_id"]]
    seen = losses(one)
    shutil.rmtree(one / "checkpoints" / "step-00000012")
    assert train_here(options(broken, one, *fixed)) == 0
    assert losses(one) == seen


@pytest.mark.dist
def test_too_many_bad_samples_stop_every_rank(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import_before_fork()
    broken = damage(shards, tmp_path / "broken", range(12))
    command = options(broken, tmp_path / "run", "data.max_bad_fraction=0.05")

    with pytest.raises(AssertionError, match=r"exit codes \[1, 1\]"):
        run_ranks(2, failing_rank, command)
    message = capfd.readouterr().err
    assert "data.max_bad_fraction=0.05" in message and "xxh3" in message
    assert read_marker(tmp_path / "run") == "FAILED"
    assert "max_bad_fraction" in (tmp_path / "run" / "FAILED").read_text()


def failing_rank(ranks: object, overrides: list[str]) -> None:
    code = train_on_rank(ranks, overrides)  # type: ignore[arg-type]
    raise SystemExit(code)


def test_a_killed_rank_fails_the_run(shards: Path, tmp_path: Path) -> None:
    """torchrun, one rank killed: the command ends with an error and says so."""
    command = options(shards, tmp_path, "train.steps=100000", "train.checkpoint_every=0")
    launcher = "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "longtake.train"
    process = start_command(command, *launcher, cwd=tmp_path)
    wait_for(lambda: 2 in losses(tmp_path), process, 120)
    marker = json.loads((tmp_path / "RUNNING").read_text())
    subprocess.run(["kill", "-9", str(marker["pid"])], check=True)
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        kill_or_leave(process)
    assert process.returncode != 0, output


def test_a_vae_run_learns_and_shows(shards: Path, tmp_path: Path) -> None:
    more = "train.val_every=6", "train.sample_every=6", "train.steps=24", "optim.lr=3e-3"
    assert train_here(options(shards, tmp_path, *more, task=TINY_VAE)) == 0
    psnr = losses(tmp_path, "val/psnr")
    assert psnr[24] > psnr[0] + 3
    assert {
        "l1",
        "kl",
        "loss",
        "lr",
        "grad_norm",
        "samples_per_second",
        "tokens_per_second",
    } <= set(json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-2]))
    drawn = tmp_path / "samples" / "step-00000024"
    captions = json.loads((drawn / "prompts.json").read_text())
    assert sorted(captions) == [f"reconstruction-{i:02d}" for i in range(3)]
    clip = probe((drawn / "reconstruction-00.mp4").read_bytes())
    assert clip.frames == 5
    assert clip.width == 3 * clip.height  # truth, reconstruction, difference


def test_a_dit_run_draws_its_prompts(shards: Path, tmp_path: Path) -> None:
    more = "samples.prompts=[a red circle,ein blauer Kreis]", "train.sample_every=2"
    assert train_here(options(shards, tmp_path, *more, "train.steps=2")) == 0
    drawn = tmp_path / "samples" / "step-00000002"
    captions = json.loads((drawn / "prompts.json").read_text())
    assert captions == {"sample-00": "a red circle", "sample-01": "ein blauer Kreis"}
    assert probe((drawn / "sample-01.mp4").read_bytes()).frames == 5


def test_a_run_with_images_first_draws_videos(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then images of the same texts, where t2i is trained: by the largest bucket of images, told
    the rate of the images."""
    rates = {}
    draw = dit_drawing._draw_texts

    def spy(*inputs: Any) -> list[Drawing]:
        rates[inputs[3]] = inputs[5]
        return draw(*inputs)

    monkeypatch.setattr(dit_drawing, "_draw_texts", spy)
    monkeypatch.setattr(dit_drawing, "drawn_rate", lambda config, frames: {1: 3.0}[frames])
    images = [write_world(tmp_path / f"images{w}", frames=1, width=w) for w in (16, 32)]
    sizes = (1, 16), (1, 32), (5, 16)
    buckets = ", ".join(f"{{frames:{n},height:16,width:{w},batch_size:2}}" for n, w in sizes)
    listed = ", ".join(f"{{path: {path}, captions: {{short: 1}}}}" for path in (*images, "VIDEOS"))
    mixed = [
        f"data.{name}=[{listed.replace('VIDEOS', f'{shards}/{name}')}]" for name in ("train", "val")
    ]
    tasks = "tasks={t2v: 1, t2i: 1, i2v: 1}"
    more = f"data.buckets=[{buckets}]", tasks, "train.sample_every=1"
    folder = tmp_path / "run"
    paths = [f"data.{name}.0.path" for name in ("train", "val")]
    overrides = [one for one in options(shards, folder) if one.split("=")[0] not in paths]
    assert train_here([*overrides, *mixed, *more, "train.steps=1"]) == 0
    drawn = folder / "samples" / "step-00000001"
    prompts = json.loads((drawn / "prompts.json").read_text())
    assert prompts["t2i-00"] == prompts["sample-00"]
    for name, frames, width in (("sample-00", 5, 16), ("i2v-00", 5, 16), ("t2i-00", 1, 32)):
        clip = probe((drawn / f"{name}.mp4").read_bytes())
        assert clip.frames == frames and clip.width % width == 0
        assert clip.width // clip.height == width // 16
    assert rates == {"sample": 8.0, "t2i": 3.0}


def test_prompts_are_drawn_without_validation_clips(shards: Path, tmp_path: Path) -> None:
    more = "data.val=[]", "samples.prompts=[red, blue]", "tasks={t2v: 1, i2v: 1}"
    assert train_here([*options(shards, tmp_path), *more, "train.sample_every=4"]) == 0
    drawn = tmp_path / "samples" / "step-00000004"
    assert json.loads((drawn / "prompts.json").read_text()) == {
        "sample-00": "red",
        "sample-01": "blue",
    }
    assert probe((drawn / "sample-01.mp4").read_bytes()).frames == 5


def test_each_clip_counts_once_in_the_loss_of_validation(shards: Path, tmp_path: Path) -> None:
    """Under the first task that it can serve, whatever is trained besides."""
    more = "tasks={t2v: 0, t2i: 1, i2v: 1}", "train.steps=1", "train.val_every=1"
    images = write_world(tmp_path / "images", frames=1)
    sizes = ", ".join(f"{{frames:{n},height:16,width:16,batch_size:2}}" for n in (1, 5))
    listed = ", ".join(f"{{path: {p}, captions: {{short: 1}}}}" for p in (images, shards / "train"))
    data = f"data.train=[{listed}]", f"data.buckets=[{sizes}]"
    overrides = [o for o in options(shards, tmp_path / "run") if not o.startswith("data.train.0")]
    assert train_here([*overrides, *data, *more]) == 0
    found = losses(tmp_path / "run", "val/loss")
    assert found and found == losses(tmp_path / "run", "val/loss/i2v")


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_step(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = options(shards, tmp_path)
    assert train_here([*command, "train.steps=4"]) == 0
    (tmp_path / "checkpoints" / ".unfinished-step-00000008").write_text(
        "a file where a folder goes"
    )
    assert train_here([*command, "resume=force"]) == 1
    assert "the checkpoint of step 8 was not written" in (tmp_path / "FAILED").read_text()
    assert max(losses(tmp_path)) < 12
    (tmp_path / "checkpoints" / ".unfinished-step-00000008").unlink()
    assert train_here([*command, "resume=force"]) == 0
    assert "goes on at step 4" in capsys.readouterr().out


def test_a_start_says_what_it_was_made_of_and_no_secret(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUB_TOKEN", "planted-secret-42")
    monkeypatch.setenv("LONGTAKE_API_KEY", "planted-secret-43")
    monkeypatch.setattr(sys, "argv", ["longtake", "planted-secret-42"])
    more = "train.steps=1", "tracking.tags=[planted-secret-42]", "train.cost_per_hour=7200"
    assert train_here(options(shards, tmp_path, *more)) == 0
    text = (tmp_path / "provenance" / "attempt-0001.json").read_text()
    assert "planted-secret" not in text
    made = json.loads(text)
    assert made["environment"]["LONGTAKE_API_KEY"] == "***" == made["command"][1]
    assert made["packages"]["torch"] and made["host"]["ranks"] == 1
    assert len(made["code"].get("commit", "0" * 40)) == 40
    assert list(made["data"]["catalogues"]) == [str(shards / "train")]
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert 0 < row["goodput"] < 1 and row["cost"] > 0 and row["quarantined"] == 0
    assert row["frames_per_second"] == pytest.approx(5 * row["samples_per_second"])
    beat = json.loads((tmp_path / "heartbeat").read_text())
    assert (beat["attempt"], beat["step"]) == (1, 0)


def test_a_folder_belongs_to_one_training(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    mark(folder, RUNNING)
    lock = FolderLock(folder)
    monkeypatch.setattr(FolderLock.__init__, "__defaults__", (0.0,))
    assert train_here(options(shards, folder)) == 1
    assert "in use by another training" in capfd.readouterr().err
    assert read_marker(folder) == RUNNING  # the other one's
    lock.release()
    assert train_here(options(shards, folder)) == 0


def test_the_logged_loss_survives_a_stop_between_two_rows(shards: Path, tmp_path: Path) -> None:
    """A row is a mean over log_every steps; the part before the stop is kept in the checkpoint."""
    more = "train.log_every=5", "train.checkpoint_every=4", "train.steps=10"
    assert train_here(options(shards, tmp_path / "whole", *more)) == 0
    folder = tmp_path / "stopped"
    assert train_here(options(shards, folder, *more)) == 0
    shutil.rmtree(folder / "checkpoints" / "step-00000010")
    assert train_here(options(shards, folder, *more)) == 0
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["attempt"] == 2
    assert losses(folder) == losses(tmp_path / "whole")


def test_a_failed_first_start_does_not_bind_the_config(shards: Path, tmp_path: Path) -> None:
    assert train_here(options(shards, tmp_path, "model.patch_size=[1,5,5]")) == 1
    assert train_here(options(shards, tmp_path)) == 0
    assert train_here(options(shards, tmp_path, "train.steps=6", "resume=force")) == 1


def test_evaluation_never_replaces_another_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no card"):
        check_replaceable(tmp_path, "card.json")
    (tmp_path / "card.json").write_text("{}")
    check_replaceable(tmp_path, "card.json")
    check_replaceable(tmp_path / "free", "card.json")
