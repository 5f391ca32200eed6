"""Checkpoints: one format for every strategy and any number of ranks.

A checkpoint is the folder `step-%08d`: a file of ranges per rank, `train_state.json`,
`config.json`, and `manifest.json`, which maps (kind, name) to ranges and carries the sha256 of
every file and of itself. The folder is written under another name and renamed at the end, so a
folder of that name is whole unless its bytes were damaged since. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import platform
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longtake.train.ema import Ema
from longtake.train.engine import Engine
from longtake.train.range_files import (
    Placed,
    RangeFiles,
    range_key,
    sha256_of,
    sync_folder,
    write_bytes,
    write_ranges,
)
from longtake.train.ranks import Ranks, single_process
from longtake.train.snapshot import (
    ADVERSARY,
    TRAIN_STATE,
    Snapshot,
    take_snapshot,
    to_json,
)
from longtake.train.strategy import RenamedReader, StateRange
from longtake.train.tasks import Opponent

FORMAT = "longtake-checkpoint-1"
MANIFEST = "manifest.json"
UNFINISHED, REPLACED = ".unfinished-", ".replaced-"
# A replaced one counts too: whoever was killed between its two renames left nothing else.
STEP_FOLDER = re.compile(r"(?:\.replaced-)?step-(\d{8,})")
logger = logging.getLogger("longtake.checkpoint")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; raised on all ranks alike."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the last so many, and those whose step divides by `every`."""

    last: int = 0  # 0 keeps all
    every: int = 0  # 0 keeps none for its step

    def has_for_ever(self, step: int) -> bool:
        """Whether the checkpoint of `step` stays however old it becomes."""
        return self.last == 0 or (self.every > 0 and step % self.every == 0)

    def stay(self, older: Sequence[int]) -> set[int]:
        """Which of the steps before the newest, `older`, newest first, stay beside it."""
        return {*older[: max(0, self.last - 1)], *filter(self.has_for_ever, older)}


def save(
    folder: Path,
    step: int,
    engine: Engine,
    ema: Ema | None,
    train_state: dict[str, Any],
    config: dict[str, Any],
    *,
    adversary: Opponent | None = None,
    keep: Keep = Keep(),
) -> Path:
    """Writes the checkpoint of `step` into `folder`; all ranks together. Returns its path.

    adversary: its engine's state goes under kinds of its own, its figures belong in train_state.
    train_state, config: JSON; train_state["samples_seen"] is copied into the manifest.
    Errors: CheckpointError on all ranks, naming the cause (disk full, read-only folder, ...);
    then nothing of the new checkpoint is left and the older ones are untouched.
    """
    snapshot = take_snapshot(engine, ema, adversary, train_state, config)
    path = write(folder, step, snapshot, engine.ranks)
    prune(folder, step, keep, engine.ranks)
    return path


def write(folder: Path, step: int, snapshot: Snapshot, ranks: Ranks) -> Path:
    """Writes a snapshot as `folder/step-%08d`; all ranks together. Errors as `save`."""
    folder = Path(folder)
    final = folder / step_name(step)
    unfinished = folder / f"{UNFINISHED}{final.name}"

    def make_folder() -> None:
        if ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            unfinished.mkdir()

    def write_own_file() -> dict[str, Any]:
        name = f"rank-{ranks.rank:05d}.safetensors"
        stamp = write_ranges(unfinished / name, snapshot.ranges)
        placed = [describe(piece, name) for piece in snapshot.ranges]
        return {"file": name, "stamp": stamp, "ranges": placed}

    def commit() -> None:
        if not ranks.is_main:
            return
        files = {report["file"]: report["stamp"] for report in reports}
        for name, text in snapshot.texts.items():
            files[name] = write_bytes(unfinished / name, text)
        manifest = {
            "format": FORMAT,
            "step": step,
            "samples_seen": snapshot.samples_seen,
            "optimizer_steps": snapshot.optimizer_steps,
            "world_size": ranks.world_size,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "files": files,
            "aliases": snapshot.aliases,
            "tensors": merge_ranges([report["ranges"] for report in reports]),
        }
        sealed = manifest | {"sha256": seal(manifest)}
        write_bytes(unfinished / f"{MANIFEST}.tmp", to_json(sealed))
        (unfinished / f"{MANIFEST}.tmp").rename(unfinished / MANIFEST)
        sync_folder(unfinished)
        put_in_place(unfinished, final)

    try:
        agree(ranks, make_folder)
        reports = agree(ranks, write_own_file)
        agree(ranks, commit)
    except CheckpointError as error:
        if ranks.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        ranks.barrier()
        raise CheckpointError(f"the checkpoint of step {step} was not written: {error}") from error
    return final


def agree(ranks: Ranks, work: Callable[[], Any]) -> list[Any]:
    """Every rank's JSON result of `work`; CheckpointError on all ranks when it failed on one."""
    try:
        outcome = {"result": work()}
    except Exception as error:  # any error: the other ranks wait in the gather below
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = (
                f"no space left ({error}); free disk space, or keep fewer checkpoints with "
                "train.keep_last. Older checkpoints are untouched"
            )
        outcome = {"error": f"rank {ranks.rank}: {text}"}
    outcomes = ranks.gather(outcome)
    errors = [outcome["error"] for outcome in outcomes if "error" in outcome]
    if errors:
        raise CheckpointError("; ".join(errors))
    return [outcome["result"] for outcome in outcomes]


def describe(piece: StateRange, file: str) -> list[Any]:
    dtype = str(piece.tensor.dtype).removeprefix("torch.")
    place = [file, range_key(piece), piece.start, piece.stop]
    return [piece.kind, piece.name, dtype, list(piece.shape), place]


def merge_ranges(reports: list[list[Any]]) -> dict[str, dict[str, Any]]:
    """kind -> name -> {dtype, shape, ranges in order} out of every rank's descriptions."""
    tensors: dict[str, dict[str, Any]] = {}
    for report in reports:
        for kind, name, dtype, shape, place in report:
            entry = {"dtype": dtype, "shape": shape, "ranges": []}
            tensors.setdefault(kind, {}).setdefault(name, entry)["ranges"].append(place)
    for named in tensors.values():
        for entry in named.values():
            entry["ranges"].sort(key=lambda place: place[2])
    return tensors


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed writer left, unless it is the only copy of its step."""
    for rest in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(rest)
    for rest in folder.glob(f"{REPLACED}*"):
        if rest.with_name(rest.name.removeprefix(REPLACED)).exists():
            shutil.rmtree(rest)


def put_in_place(unfinished: Path, final: Path) -> None:
    """Renames; a checkpoint of the same step (damaged, or of another attempt) gives way."""
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    unfinished.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def prune(folder: Path, step: int, keep: Keep, ranks: Ranks, spare: int | None = None) -> None:
    """Deletes the checkpoints older than `step` that need not be kept, if that of `step` verifies.

    spare: a step whose files rank 0 still needs.
    """
    surplus: list[str] = []
    if ranks.is_main:
        older = [(number, path) for number, path in list_steps(folder) if number < step]
        stay = keep.stay([number for number, _ in older]) | {spare}
        surplus = [str(path) for number, path in older if number not in stay]
    surplus = ranks.broadcast(surplus)
    if not surplus:
        return
    problems = verify(folder / step_name(step), ranks)
    if problems:
        logger.warning("older checkpoints stay, the new one is damaged: %s", "; ".join(problems))
        return
    if ranks.is_main:
        for path in map(Path, surplus):
            gone = path.with_name(f"{UNFINISHED}{path.name}")  # no longer a checkpoint, at once
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def step_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def list_steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in `folder`, newest first, verified or not."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    matches = [(STEP_FOLDER.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(((int(m[1]), path) for m, path in matches if m), reverse=True)


def find_last_good(folder: Path, ranks: Ranks | None = None) -> Path | None:
    """The newest checkpoint in `folder` that verifies, or None; all ranks get the same answer.

    Damaged ones are passed over with a warning that says what is wrong with them.
    """
    ranks = ranks or single_process()
    candidates: list[str] = []
    if ranks.is_main:
        candidates = [str(path) for _, path in list_steps(folder)]
    for candidate in map(Path, ranks.broadcast(candidates)):
        problems = verify(candidate, ranks)
        if not problems:
            return candidate
        if ranks.is_main:
            logger.warning("checkpoint %s is passed over: %s", candidate, "; ".join(problems))
    return None


def verify(path: Path, ranks: Ranks | None = None) -> list[str]:
    """What is wrong with a checkpoint, empty when it is whole; equal on all ranks.

    The ranks divide the files among them and compare every sha256 with the manifest.
    """
    ranks = ranks or single_process()
    answer: dict[str, Any] = {}
    if ranks.is_main:
        try:
            answer = {"files": read_manifest(path)["files"]}
        except CheckpointError as error:
            answer = {"problem": str(error)}
    answer = ranks.broadcast(answer)
    if "problem" in answer:
        return [answer["problem"]]
    problems = []
    files = sorted(answer["files"].items())
    for name, stamp in files[ranks.rank :: ranks.world_size]:
        try:
            if sha256_of(path / name) != stamp["sha256"]:
                problems.append(f"{name} differs from its sha256 in {MANIFEST}")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return [problem for found in ranks.gather(problems) for problem in found]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; CheckpointError when it is damaged, missing or not ours."""
    try:
        manifest = json.loads((Path(path) / MANIFEST).read_bytes())
        digest = manifest.pop("sha256")
    except OSError as error:
        raise CheckpointError(f"{MANIFEST} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged") from error
    if digest != seal(manifest):
        raise CheckpointError(f"{MANIFEST} differs from its own sha256")
    if manifest["format"] != FORMAT:
        text = f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}"
        raise CheckpointError(text)
    if any(Path(name).name != name for name in manifest["files"]):  # it came over a network, maybe
        raise CheckpointError(f"{MANIFEST} names files outside its folder")
    return manifest


def seal(manifest: dict[str, Any]) -> str:
    """sha256 of the manifest's content, whatever its spacing."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


class CheckpointReader:
    """Reads ranges of one checkpoint, by whatever ranks it was written."""

    def __init__(self, path: Path) -> None:
        self.manifest = read_manifest(path)
        self.files = RangeFiles(Path(path))

    @property
    def optimizer_steps(self) -> int:
        return self.manifest["optimizer_steps"]

    def shape(self, kind: str, name: str) -> tuple[int, ...] | None:
        """Shape of the whole tensor, or None where the checkpoint has none."""
        entry = self.manifest["tensors"].get(kind, {}).get(name)
        return None if entry is None else tuple(entry["shape"])

    def read(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the row-major buffer, (stop - start,), in the stored dtype.

        Errors: KeyError for an unknown tensor, ValueError where the ranges leave a gap.
        """
        places = [Placed(*place) for place in self.manifest["tensors"][kind][name]["ranges"]]
        return self.files.read(places, start, stop)


def load_into(
    path: Path, engine: Engine, ema: Ema | None, adversary: Opponent | None = None
) -> dict[str, Any]:
    """Restores engine, EMA and adversary from a checkpoint; all ranks together.

    Returns its train_state. An adversary that the checkpoint does not know begins anew, and a
    warning says so. Each rank reads only the ranges it holds. Hashes are not checked again: take
    the path from `find_last_good`, or call `verify`.
    """
    reader = CheckpointReader(path)
    engine.load_ranges(reader)
    if ema is not None:
        ema.load_ranges(reader)
    state = json.loads((Path(path) / TRAIN_STATE).read_bytes())
    if adversary is not None and state["adversary"] is None:
        logger.warning("checkpoint %s knows no discriminator: it begins anew", path)
    elif adversary is not None:
        figures = state["adversary"]
        adversary.engine.load_ranges(RenamedReader(reader, ADVERSARY, figures["optimizer_steps"]))
        adversary.load(figures)
    return state


def load_full(path: Path, kind: str = "ema") -> dict[str, torch.Tensor]:
    """The whole state dict of a checkpoint, on the CPU, for tools of one process.

    kind: "ema" or "param"; what has no mean (frozen parameters, buffers) comes as it is.
    Errors: CheckpointError when the checkpoint is damaged, ValueError for another kind.
    """
    if kind not in ("ema", "param"):
        raise ValueError(f"kind={kind} must be ema or param")
    problems = verify(path)
    if problems:
        raise CheckpointError(f"{path} is damaged: {'; '.join(problems)}")
    reader = CheckpointReader(path)
    tensors = reader.manifest["tensors"]
    state: dict[str, torch.Tensor] = {}
    for chosen in ("param", "buffer", kind):
        for name, entry in tensors.get(chosen, {}).items():
            if chosen == "param" and name in tensors.get(kind, {}) and kind != "param":
                continue  # the mean comes below
            numel = math.prod(entry["shape"])
            state[name] = reader.read(chosen, name, 0, numel).view(entry["shape"])
    return state | {alias: state[name] for alias, name in reader.manifest["aliases"].items()}
