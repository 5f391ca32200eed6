"""Where numbers and videos of a run go: metrics.jsonl always, Weights & Biases by choice.

The only module that knows wandb. Nothing that happens there may stop a training.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from longtake.train.attempts import read_record
from longtake.train.run_folder import METRICS, RANK_TIMES
from longtake.train.schema import TrackingConfig

SECRET_NAME = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|credentials?)$", re.I)
URL_LOGIN = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
HIDDEN = "***"
INIT_SECONDS = 30.0  # an unreachable server costs this once, then the run is kept offline


class Tracker:
    """Writes rows and videos on rank 0; on other ranks every call is free.

    `attempt` counts the starts of this run folder and is part of every row: after a resume the rows
    of a step appear again, and readers keep the last attempt (`read_metrics`).
    """

    def __init__(
        self, run_dir: Path, config: TrackingConfig, tree: Mapping[str, Any], attempt: int
    ) -> None:
        self.run_dir = run_dir
        self.attempt = attempt
        run_id = str(read_record(run_dir)["wandb_id"])
        self._file = _open_rows(run_dir / METRICS)
        self._wandb, self._run = _start_wandb(run_dir, run_id, config, tree) or (None, None)

    def log(self, step: int, row: Mapping[str, float | str]) -> None:
        """One row of metrics.jsonl: {"step", "attempt", **row}; non-finite numbers become null."""
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        self._file.write(json.dumps({"step": step, "attempt": self.attempt, **clean}) + "\n")
        self._file.flush()
        self._send(lambda wandb: {**row, "step": step})

    def log_ranks(self, step: int, times: Mapping[str, list[float]]) -> None:
        """One row of ranks.jsonl: what each rank spent its time on, seconds per step."""
        row = {"step": step, "attempt": self.attempt, **times}
        with (self.run_dir / RANK_TIMES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def log_videos(self, step: int, videos: Mapping[str, Path]) -> None:
        """Show mp4 or png files under their names; they stay where they are in the run folder."""

        def media(wandb: Any) -> dict[str, Any]:
            shown = {
                name: wandb.Image(str(path))
                if path.suffix == ".png"
                else wandb.Video(str(path), format="mp4")
                for name, path in videos.items()
            }
            return {**shown, "step": step}

        self._send(media)

    def log_table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        """Show a table under a name."""
        data = [list(row) for row in rows]
        self._send(
            lambda wandb: {name: wandb.Table(columns=list(columns), data=data), "step": step}
        )

    def finish(self, exit_code: int) -> None:
        """Flush and close; W&B shows the run as failed for a non-zero code."""
        try:
            self._file.close()
        except OSError as error:
            warnings.warn(f"{self._file.name}: {error}", stacklevel=2)
        if self._run is not None:
            run, self._run = self._run, None
            try:
                run.finish(exit_code=exit_code)
            except Exception as error:
                warnings.warn(f"W&B could not finish the run: {error}", stacklevel=2)

    def _send(self, make: Callable[[Any], dict[str, Any]]) -> None:
        """Log what `make(wandb)` returns, while W&B works."""
        if self._run is None:
            return
        try:
            self._run.log(make(self._wandb))
        except Exception as error:
            warnings.warn(f"W&B is off from here, metrics.jsonl goes on: {error}", stacklevel=2)
            self._run = None


def _start_wandb(
    run_dir: Path, run_id: str, config: TrackingConfig, tree: Mapping[str, Any]
) -> tuple[ModuleType, Any] | None:
    """The wandb module and its run, online or kept offline; None, with a warning, for neither."""
    if config.backend != "wandb" or config.mode == "disabled":
        return None
    try:
        import wandb
        from wandb.sdk.lib.import_hooks import unregister_all_post_import_hooks

        options: dict[str, Any] = {
            "project": config.project,
            "entity": config.entity,
            "name": config.name or run_dir.name,
            "tags": config.tags,
            "id": run_id,
            "dir": str(run_dir),
            "config": redact(tree),
            "settings": wandb.Settings(init_timeout=INIT_SECONDS, console="off", silent=True),
        }
        if config.mode == "online":
            try:
                run = wandb.init(mode="online", resume="allow", **options)
            except wandb.Error as error:
                warnings.warn(f"W&B is not reachable ({error}); kept offline", stacklevel=2)
                run = wandb.init(mode="offline", **options)
        else:
            run = wandb.init(mode="offline", **options)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        # They tell W&B what is imported, and fail any later import once its process is gone.
        unregister_all_post_import_hooks()
    except Exception as error:
        warnings.warn(f"W&B is off: {error}", stacklevel=2)
        return None
    return wandb, run


def send_evaluation(
    run_dir: Path,
    config: TrackingConfig,
    tree: Mapping[str, Any],
    row: Mapping[str, Any],
    table: tuple[Sequence[str], Sequence[Sequence[Any]]],
) -> None:
    """Show a finished evaluation in the W&B run of `run_dir`: a row with its step, and a table
    (columns, rows). Nothing where the run is not tracked there."""
    started = _start_wandb(run_dir, str(read_record(run_dir)["wandb_id"]), config, tree)
    if started is None:
        return
    wandb, run = started
    try:
        try:
            columns, rows = table
            shown = wandb.Table(columns=list(columns), data=[list(values) for values in rows])
            run.log({**row, "evaluation": shown})
        finally:
            run.finish()
    except Exception as error:
        warnings.warn(f"W&B could not take the evaluation: {error}", stacklevel=2)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl in step order; of a step logged twice, those of the last attempt.

    A torn last line (the run was killed while writing) is left out. Empty without a file.
    """
    rows: dict[tuple[int, frozenset[str]], dict[str, Any]] = {}
    last: dict[int, int] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        step, attempt = int(row["step"]), int(row["attempt"])
        last[step] = max(last.get(step, 0), attempt)
        rows[step, frozenset(row)] = row
    kept = [row for row in rows.values() if row["attempt"] == last[row["step"]]]
    return sorted(kept, key=lambda row: row["step"])


def redact(tree: Any, name: str = "") -> Any:
    """A copy without secrets: values under telling names, logins in URLs, secrets of this process's
    environment wherever they stand."""
    if isinstance(tree, Mapping):
        return {key: redact(value, str(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact(value, name) for value in tree]
    if not isinstance(tree, str):
        return tree
    if SECRET_NAME.search(name):
        return HIDDEN
    text = URL_LOGIN.sub(HIDDEN, tree)
    for key, secret in os.environ.items():
        if SECRET_NAME.search(key) and len(secret) >= 8:
            text = text.replace(secret, HIDDEN)
    return text


def _open_rows(path: Path) -> TextIO:
    """For appending; a line torn by a kill is ended first, or it would swallow the next row."""
    is_torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    file = path.open("a", encoding="utf-8")
    if is_torn:
        file.write("\n")
    return file
