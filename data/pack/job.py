"""What a pack has done so far, on disk: killed at any moment, the next call goes on from there."""

import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

JOB, JOURNAL, LOCK = "job.json", "journal.jsonl", "lock"


@dataclass(frozen=True)
class ClipFacts:
    """A clip to store: its extension, bytes, mean frame rate, and seconds in the source."""

    ext: str
    size: int
    fps: float
    start: float
    stop: float


@dataclass(frozen=True)
class Outcome:
    """What became of a file: clips (in the spool, or else the file's own bytes) or a reason.

    `xxh3` is of the file's bytes; `twin` names an earlier file with the same ones; `too_short`
    counts clips below the least duration.
    """

    xxh3: str = ""
    clips: tuple[ClipFacts, ...] = ()
    is_spooled: bool = False
    too_short: int = 0
    twin: str | None = None
    reason: str | None = None

    @property
    def num_bytes(self) -> int:
        """Of all its clips."""
        return sum(clip.size for clip in self.clips)


class Job:
    """The folder OUT.partial: a lock, the arguments, a journal, a spool and the shards.

    Outcomes are journalled as they come. Recoded clips wait in the spool for their turn, so a kill
    costs no more than the files in work and the writing of one shard.
    """

    def __init__(self, out: Path, asked: dict[str, Any]) -> None:
        """Begin, or go on with what was begun; the shards will appear as `out`.

        Raises:
            ValueError: another pack is at work there, or it was begun with other arguments.
        """
        folder = partial_folder(out)
        self.out, self.folder, self.shards = out, folder, folder / "shards"
        self.outcomes: dict[int, Outcome] = {}
        self.num_shards = 0
        self.position = (0, 0)  # (source, clip) where the first unfinished shard begins
        self._lock = _locked(folder)
        try:
            _check_asked(folder / JOB, asked)
            published = is_published(out)
            (folder / "spool").mkdir(exist_ok=True)
            if not published:
                self.shards.mkdir(exist_ok=True)
            self._read_journal()
            self._journal = open(folder / JOURNAL, "ab")  # noqa: SIM115 - closed in close
        except BaseException:
            self._lock.close()
            raise
        if not published:
            self._sweep()

    def spool(self, index: int) -> Path:
        """Where the recoded clips of a source lie, one behind the other."""
        return self.folder / "spool" / f"{index:09d}"

    def record(self, index: int, outcome: Outcome) -> None:
        """Remember what became of a source."""
        self.outcomes[index] = outcome
        self._append({"source": index, **asdict(outcome)})

    def shard_done(self, position: tuple[int, int]) -> None:
        """One more shard is whole; the next begins at `position`."""
        # The journal may lag behind the shards, never run ahead of what its lines rely on.
        self._append({"shards": self.num_shards + 1, "position": position})
        os.fsync(self._journal.fileno())
        for index in range(self.position[0], position[0]):
            self.spool(index).unlink(missing_ok=True)
        self.num_shards, self.position = self.num_shards + 1, position

    def publish(self) -> None:
        """Let the shards appear, unless they did, and forget the rest."""
        if self.shards.exists():
            if self.out.exists():
                self.out.rmdir()  # empty, or it is an error
            os.replace(self.shards, self.out)
        self.forget()

    def forget(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)
        self.close()

    def close(self) -> None:
        """Let others go on with it."""
        try:
            self._journal.close()  # a full disk refuses its last line once more
        finally:
            self._lock.close()

    def _append(self, entry: dict[str, Any]) -> None:
        self._journal.write(json.dumps(entry).encode() + b"\n")
        self._journal.flush()

    def _read_journal(self) -> None:
        path = self.folder / JOURNAL
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # killed within a line
            os.truncate(path, len(whole))
        try:
            entries = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise ValueError(f"{path}: damaged: {error}; remove {self.folder}") from None
        for entry in entries:
            if "shards" in entry:
                self.num_shards, self.position = entry["shards"], tuple(entry["position"])
                continue
            index = entry.pop("source")
            entry["clips"] = tuple(ClipFacts(**clip) for clip in entry["clips"])
            self.outcomes[index] = Outcome(**entry)
        for index in [i for i in self.outcomes if i >= self.position[0]]:
            outcome, path = self.outcomes[index], self.spool(index)
            if outcome.is_spooled and not path.exists():  # a crash of the machine can do that
                del self.outcomes[index]

    def _sweep(self) -> None:
        """Remove what was being written, and a catalogue, which is made of all shards."""
        whole = sorted(self.shards.glob("*.tar"))[: self.num_shards]
        if len(whole) < self.num_shards:
            self.close()
            raise ValueError(
                f"{self.folder}: holds {len(whole)} of {self.num_shards} finished shards; "
                "remove the folder to begin anew"
            )
        for path in self.shards.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path not in whole:
                path.unlink()
        for path in (self.folder / "spool").glob("*.tmp"):
            path.unlink()


def partial_folder(out: Path) -> Path:
    """Where a pack into `out` is prepared."""
    return out.with_name(f"{out.name}.partial")


def is_published(out: Path) -> bool:
    """Whether a pack was killed after its shards had appeared, but before the rest was removed."""
    folder = partial_folder(out)
    return out.exists() and (folder / JOURNAL).exists() and not (folder / "shards").exists()


def _locked(folder: Path) -> BinaryIO:
    """The lock dies with its process, however that ends.

    lockf, not flock: workers would inherit that, and hold it a moment longer than a killed parent.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOCK
        file = open(path, "ab")  # noqa: SIM115 - held until Job.close
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise ValueError(f"{folder}: another `longtake pack` is at work there") from None
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()  # the other one finished, and removed the folder, in between


def _check_asked(path: Path, asked: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(asked))
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
        os.replace(temporary, path)
        return
    known = json.loads(path.read_text(encoding="utf-8"))
    differing = [key for key in {**known, **wanted} if known.get(key) != wanted.get(key)]
    if differing:
        changes = ", ".join(f"{k}={wanted.get(k)!r} (was {known.get(k)!r})" for k in differing)
        raise ValueError(
            f"{path.parent}: was begun with other arguments: {changes}; "
            "repeat those, or remove the folder to begin anew"
        )
