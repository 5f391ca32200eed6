"""A folder of ordinary video files with captions into indexed shards."""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from longtake.data.catalogue import Catalogue, build_catalogue, load_catalogue
from longtake.data.catalogue.indexing import content_hash
from longtake.data.decode import DecodeError
from longtake.data.decode.mux import ENCODER
from longtake.data.pack.job import ClipFacts, Job, Outcome, is_published
from longtake.data.pack.progress import PackProgress
from longtake.data.pack.recode import Recipe, make_clips
from longtake.data.pack.sources import Source, find_sources, make_key
from longtake.data.pack.workers import WorkerPool
from longtake.data.samples import SampleError
from longtake.data.shards import ShardWriter

SKIPPED = "skipped.jsonl"
_AHEAD = 64  # finished files that may wait for a slower one before them
_MEMORY = 8 * 2**30  # bytes that a worker may take, besides three times the largest file


@dataclass
class PackReport:
    """What was packed. `skipped` and `duplicates` list (file or line, reason or twin)."""

    out: Path
    packed: int = 0
    num_files: int = 0
    num_split: int = 0
    too_short: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)

    @property
    def catalogue(self) -> Catalogue:
        """Of the folder that was written."""
        return load_catalogue(self.out)

    def summary(self, limit: int = 20) -> str:
        """Counts and the first reasons, for printing; names that are not UTF-8 are escaped."""
        lines = [f"packed {self.packed} clips of {self.num_files} files into {self.out}"]
        if self.num_split:
            lines.append(f"split {self.num_split} files at the longest duration")
        if self.too_short:
            lines.append(f"dropped {self.too_short} clips below the shortest duration")
        if self.duplicates:
            lines.append(f"duplicates dropped {len(self.duplicates)}:")
            lines += [f"  {file}: same bytes as {twin}" for file, twin in self.duplicates[:limit]]
        if self.skipped:
            lines.append(f"skipped {len(self.skipped)}:")
            lines += [f"  {file}: {reason}" for file, reason in self.skipped[:limit]]
        if max(len(self.skipped), len(self.duplicates)) > limit:
            lines.append(f"  all of them are in {self.out / SKIPPED}")
        lines += self.catalogue.rejections()
        return "\n".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")


def pack_folder(
    folder: Path | str,
    out: Path | str,
    captions_jsonl: Path | str | None = None,
    *,
    recipe: Recipe | None = None,
    dataset: str | None = None,
    val_fraction: float = 0.0,
    dedup: bool = True,
    max_samples: int = 500,
    max_bytes: int = 2**28,
    num_workers: int = 2,
    timeout: float = 300.0,
    progress: bool = True,
) -> PackReport:
    """Pack the files that `captions_jsonl` (default: captions.jsonl in the folder) names.

    A line is {"file": ..., "caption": "..."} or "captions": {kind: text}; source, licence,
    source_id, split, truth and scores are kept. Without captions.jsonl, clip.json and clip.txt
    beside clip.mp4 describe it. Files that cannot be read, or keep a worker busy for `timeout`
    seconds without a frame, and lines that cannot be used are skipped with a reason, copies of a
    file are dropped. `val_fraction` of the sources get split "val" unless their line says
    otherwise. The shards are the same for any number of workers. `out` appears when it is whole;
    until then <out>.partial holds what is done, and the same call goes on from there.

    Raises:
        ValueError: no folder, no captions, `out` is not empty, nothing could be packed, or
            <out>.partial is in use or was begun with other arguments.
        OSError: the disk is full; what is done is kept.
    """
    folder, out, recipe = Path(folder), Path(out), recipe or Recipe()
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of videos")
    is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not is_free and not is_published(out):
        raise ValueError(f"{out}: exists and is not empty; give a new folder or remove it")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must lie in 0..1, below 1")
    if num_workers < 1 or not timeout > 0:
        raise ValueError(f"num_workers={num_workers} and timeout={timeout} must be positive")
    sources = find_sources(folder, Path(captions_jsonl) if captions_jsonl else None)
    asked = {
        "folder": str(folder.resolve()),
        "captions": _fingerprint(sources),
        "recipe": asdict(recipe),
        "encoder": ENCODER,
        "dataset": dataset or out.resolve().name,
        "val_fraction": val_fraction,
        "dedup": dedup,
        "max_samples": max_samples,
        "max_bytes": max_bytes,
    }
    job = Job(out, asked)
    try:
        sizes = [_size(folder, source) for source in sources]
        packer = _Packer(job, folder, sources, sizes, asked)
        bar = PackProgress(sizes, out, show=progress)
        memory = _MEMORY + 3 * max(sizes, default=0)
        with bar, WorkerPool(partial(_work, recipe), num_workers, timeout, memory) as pool:
            packer.run(pool, bar)
        return packer.publish()
    except OSError as error:
        if error.errno is None:
            raise
        message = f"{error.strerror}; what is done is kept, the same command goes on from there"
        raise OSError(error.errno, message, str(job.folder)) from error
    finally:
        job.close()


class _Packer:
    """Gives files to workers and appends what they made to the shards, in the captions' order."""

    def __init__(
        self,
        job: Job,
        folder: Path,
        sources: list[Source],
        sizes: list[int],
        asked: dict[str, Any],
    ) -> None:
        self._job, self._folder, self._asked = job, folder, asked
        self._sources, self._sizes = sources, sizes
        self._report = PackReport(job.out)
        self._keys: Counter[str] = Counter()
        self._same_size = Counter(sizes)
        # Hash of a file's bytes -> the first file that has them.
        self._owners = {
            outcome.xxh3: index
            for index, outcome in sorted(job.outcomes.items(), reverse=True)
            if outcome.xxh3 and not outcome.twin
        }

    def run(self, pool: WorkerPool, bar: PackProgress) -> None:
        """Until every file has its outcome and every clip lies in a shard."""
        job, total = self._job, len(self._sources)
        submitted = appended = 0
        with ShardWriter(
            job.shards,
            max_samples=self._asked["max_samples"],
            max_bytes=self._asked["max_bytes"],
            start=job.num_shards,
        ) as writer:
            while appended < total:
                while appended < submitted and appended in job.outcomes:
                    self._append(writer, appended, job.outcomes.pop(appended))
                    appended += 1
                while submitted < min(total, appended + _AHEAD) and pool.has_idle:
                    self._submit(pool, submitted, bar)
                    submitted += 1
                for index, outcome, failure in pool.results() if pool.num_busy else ():
                    outcome = outcome or Outcome(self._hash_of(index), reason=failure)
                    job.record(index, outcome)
                    bar.done(index, outcome.num_bytes, is_fresh=True)
        if writer.paths:
            job.shard_done((total, 0))

    def publish(self) -> PackReport:
        """Index the shards, note what was left out, and let them appear."""
        report, job = self._report, self._job
        if not report.packed:
            job.forget()
            raise ValueError(f"{self._folder}: nothing could be packed: {report.skipped[:5]}")
        if job.shards.exists():
            made = build_catalogue(job.shards, dataset=self._asked["dataset"], progress=False)
            if len(made) + len(made.rejected) != report.packed:
                raise RuntimeError(
                    f"{job.out}: {report.packed} clips were packed, the catalogue knows of "
                    f"{len(made)} and {len(made.rejected)} rejected ones"
                )
            left_out = [{"file": file, "reason": reason} for file, reason in report.skipped]
            left_out += [{"file": file, "same_as": twin} for file, twin in report.duplicates]
            text = "".join(json.dumps(entry) + "\n" for entry in left_out)
            (job.shards / SKIPPED).write_text(text, encoding="utf-8")
        job.publish()
        return report

    def _submit(self, pool: WorkerPool, index: int, bar: PackProgress) -> None:
        """Find the outcome of a file without work, or give it to a worker."""
        source, job = self._sources[index], self._job
        if index not in job.outcomes:
            if source.reason:
                job.outcomes[index] = Outcome(reason=source.reason)
            elif (twin := self._twin(index)) is not None:
                job.record(index, twin)
            else:
                path = self._folder / source.name
                return pool.submit(index, (path, source.ext, job.spool(index)))
        bar.done(index, job.outcomes[index].num_bytes, is_fresh=False)
        return None

    def _twin(self, index: int) -> Outcome | None:
        """Files of one size are hashed before any work; the first in order stays."""
        if not self._asked["dedup"] or self._same_size[self._sizes[index]] < 2:
            return None
        try:
            with open(self._folder / self._sources[index].name, "rb") as file:
                xxh3 = _hash(file)
        except OSError:  # the worker will say so
            return None
        owner = self._owners.setdefault(xxh3, index)
        return None if owner == index else Outcome(xxh3, twin=self._sources[owner].name)

    def _hash_of(self, index: int) -> str:
        """Where the worker cannot say it; copies of what killed one are not tried again."""
        return next((xxh3 for xxh3, owner in self._owners.items() if owner == index), "")

    def _append(self, writer: ShardWriter, index: int, outcome: Outcome) -> None:
        source, report = self._sources[index], self._report
        report.too_short += outcome.too_short
        if outcome.reason:
            report.skipped.append((source.name, outcome.reason))
        elif outcome.twin:
            report.duplicates.append((source.name, outcome.twin))
        is_split = len(outcome.clips) + outcome.too_short > 1
        report.num_files += bool(outcome.clips)
        report.num_split += is_split
        report.packed += len(outcome.clips)
        for number, clip in enumerate(outcome.clips):
            key = make_key(source.name, f"_{number:03d}" if is_split else "", self._keys)
            if (index, number) < self._job.position:
                continue  # an earlier call did that
            facts = {"fps": clip.fps, "source_xxh3": outcome.xxh3}
            if is_split:
                facts |= {"start": round(clip.start, 6), "stop": round(clip.stop, 6)}
            meta = source.meta(self._asked["val_fraction"], facts)
            finished = len(writer.paths)
            writer.write(key, {clip.ext: self._payload(index, number, outcome), "json": meta})
            if len(writer.paths) > finished:
                self._job.shard_done((index, number))

    def _payload(self, index: int, number: int, outcome: Outcome) -> bytes:
        if outcome.is_spooled:
            with open(self._job.spool(index), "rb") as file:
                file.seek(sum(clip.size for clip in outcome.clips[:number]))
                return file.read(outcome.clips[number].size)
        path = self._folder / self._sources[index].name
        data = path.read_bytes()
        if content_hash(data) != outcome.xxh3:
            raise ValueError(
                f"{path}: changed while it was being packed; "
                f"remove {self._job.folder} to begin anew"
            )
        return data


def _work(recipe: Recipe, task: tuple[Path, str, Path], alive: Callable[[], None]) -> Outcome:
    """One file, in a worker. OSError speaks of the spool's disk, never of the file."""
    path, ext, spool = task
    try:
        data = path.read_bytes()
    except OSError as error:
        return Outcome(reason=f"cannot be read: {error.strerror}")
    xxh3 = content_hash(data)
    facts: list[ClipFacts] = []
    too_short, is_spooled = 0, False
    temporary = spool.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for clip in make_clips(data, ext, recipe, alive):
                if clip is None:
                    too_short += 1
                    continue
                if clip.data is not data:
                    is_spooled = True
                    file.write(clip.data)
                size = len(clip.data)
                facts.append(ClipFacts(clip.ext, size, clip.fps, clip.start, clip.stop))
            file.flush()
            os.fsync(file.fileno())
        if is_spooled:
            os.replace(temporary, spool)
    except (SampleError, DecodeError) as error:
        return Outcome(xxh3, reason=str(error))
    finally:
        temporary.unlink(missing_ok=True)
    return Outcome(xxh3, tuple(facts), is_spooled, too_short)


def _size(folder: Path, source: Source) -> int:
    try:
        return 0 if source.reason else (folder / source.name).stat().st_size
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return 0


def _fingerprint(sources: list[Source]) -> str:
    hashed = xxhash.xxh3_128()
    for source in sources:
        hashed.update(f"{source.name}\0".encode("utf-8", "surrogateescape") + source.line)
    return hashed.hexdigest()


def _hash(file: BinaryIO) -> str:
    hashed = xxhash.xxh3_128()
    while chunk := file.read(1 << 20):
        hashed.update(chunk)
    return hashed.hexdigest()
