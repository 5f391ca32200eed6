"""metrics.jsonl always, W&B offline, and no secrets in either."""

import importlib
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

from longtake.data.decode import encode_video
from longtake.train.attempts import Attempts
from longtake.train.schema import TrackingConfig
from longtake.train.tracking import Tracker, read_metrics, redact, send_evaluation
from tests.data.toy import toy_frames

JSONL = TrackingConfig("jsonl", "disabled", "longtake", None, None, [])
OFFLINE = TrackingConfig("wandb", "offline", "longtake", None, None, ["test"])
ONLINE = TrackingConfig("wandb", "online", "longtake", None, None, [])


def start(folder: Path, config: TrackingConfig, tree: dict) -> Tracker:
    return Tracker(folder, config, tree, Attempts(folder, 0).number)


def test_readers_keep_the_last_attempt(tmp_path: Path) -> None:
    first = start(tmp_path, JSONL, {})
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)})
    first.log(2, {"val/loss": 0.5})
    first.finish(0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "att')  # killed while writing
    second = start(tmp_path, JSONL, {})
    assert (first.attempt, second.attempt) == (1, 2)
    second.log(3, {"loss": 30.0, "lr": float("nan")})
    second.finish(0)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["attempt"]) for r in rows] == [(1, 1), (2, 1), (2, 1), (3, 2)]
    assert rows[-1] == {"step": 3, "attempt": 2, "loss": 30.0, "lr": None}
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sesame-open-123")
    tree = {
        "hub_token": "abc",
        "password": "x",
        "deep": {"api_key": "k", "list": ["https://me:pw@host/data", "sesame-open-123/file"]},
        "max_tokens": "64",
        "lr": 0.1,
    }
    assert redact(tree) == {
        "hub_token": "***",
        "password": "***",
        "deep": {"api_key": "***", "list": ["https://***@host/data", "***/file"]},
        "max_tokens": "64",
        "lr": 0.1,
    }


def test_wandb_offline_keeps_its_id_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SECRET", "planted-secret-42")
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(encode_video(toy_frames(0), 8))
    for step in (1, 2):
        tracker = start(tmp_path, OFFLINE, {"note": "planted-secret-42", "lr": 0.5})
        tracker.log(step, {"loss": 1.0 / step})
        tracker.log_videos(step, {"clip": clip})
        tracker.finish(0)
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    ids = {run.name.rsplit("-", 1)[1] for run in runs}
    assert len(ids) == 1
    assert ids == {json.loads((tmp_path / "run.json").read_text())["wandb_id"]}
    files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert any(path.suffix == ".mp4" for path in files)
    assert not [path for path in files if b"planted-secret-42" in path.read_bytes()]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_wandb_that_fails_never_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def refuse(**options: object) -> None:
        raise wandb.Error(f"no route to the server, mode={options['mode']}")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.warns(UserWarning, match=r"not reachable|W&B is off"):
        tracker = start(tmp_path, ONLINE, {})
    tracker.log(1, {"loss": 2.0})
    tracker.finish(1)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 2.0


class Dying:
    """A W&B run whose service has gone."""

    def log(self, row: dict[str, object]) -> None:
        raise ConnectionError("the service is gone")


def test_wandb_that_dies_is_left_behind(tmp_path: Path) -> None:
    tracker = start(tmp_path, JSONL, {})
    tracker._run = Dying()
    with pytest.warns(UserWarning, match="service is gone"):
        tracker.log(1, {"loss": 2.0})
    tracker.log(2, {"loss": 1.0})
    tracker.finish(0)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_wandb_process_stops_nothing(tmp_path: Path) -> None:
    """In a process of its own: W&B keeps one connection as long as a process lives."""
    process = multiprocessing.get_context("spawn").Process(target=lose_wandb, args=(tmp_path,))
    process.start()
    process.join(240)
    assert process.exitcode == 0
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 49


def lose_wandb(folder: Path) -> None:
    os.environ.pop("WANDB_SERVICE", None)  # of the process that runs the other tests
    tracker = start(folder, OFFLINE, {})
    tracker.log(1, {"loss": 2.0})
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    names = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    killed = [pid for pid, name in names.items() if "wandb" in name]
    assert killed
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    for step in range(2, 50):
        tracker.log(step, {"loss": 1.0})
    (folder / "catboost.py").write_text("")  # a name whose import W&B asks to be told of
    sys.path.insert(0, str(folder))
    importlib.import_module("catboost")
    tracker.finish(0)


def test_an_evaluation_goes_to_the_run_it_is_of(tmp_path: Path) -> None:
    tracker = start(tmp_path, OFFLINE, {})
    tracker.log(1, {"loss": 1.0})
    tracker.finish(0)
    table = ("family", "score"), [["move", 0.5]]
    send_evaluation(tmp_path, OFFLINE, {}, {"step": 1, "card.mean": 0.5}, table)
    send_evaluation(tmp_path, JSONL, {}, {"step": 1}, table)  # not tracked there: nothing
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    record = json.loads((tmp_path / "run.json").read_text())
    assert len(runs) == 2 and all(record["wandb_id"] in run.name for run in runs)
    tables = [path for run in runs for path in run.rglob("*.json") if "table" in str(path)]
    assert tables and record["attempts"] == 1
