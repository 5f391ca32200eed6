"""One run of `longtake index`: over processes, resumed where it was stopped, swapped in when whole.

Each worker writes its shard's Parquet file into a staging folder beside the catalogue; the parent
keeps counts, digests and sample ids only, so memory does not grow with what the rows hold.
"""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from longtake.data.catalogue.indexing import SCHEMA, SCHEMA_VERSION, index_shard
from longtake.data.process_map import map_processes, sample_bar
from longtake.data.shards import ShardError
from longtake.data.shards.storage import Root, join, local_copy

MANIFEST = "manifest.json"
FACTS = b"longtake"  # key of the Parquet file's own metadata
_JOURNAL, _LOCK = ".journal.jsonl", ".lock"
_SHOWN = 20  # damaged shards that an error lists


@dataclass(frozen=True)
class ShardState:
    """A tar as it is now. One that keeps name, bytes and time of change is taken for unchanged; a
    remote one (`mtime_ns` 0) that keeps name and bytes."""

    name: str
    bytes: int
    mtime_ns: int = 0


@dataclass(frozen=True)
class ShardFacts:
    """What the parent keeps of an indexed shard; `ids` is the bytes of uint64 sample ids."""

    state: ShardState
    digest: str
    rejected: int
    passed_over: dict[str, int]
    ids: bytes = field(repr=False)

    @property
    def samples(self) -> int:
        """Rows of the shard."""
        return len(self.ids) // 8


@dataclass(frozen=True)
class IndexOptions:
    """What the rows depend on besides the shard."""

    dataset: str
    probe: str
    schema_version: int = SCHEMA_VERSION


def part_name(shard: str) -> str:
    """File name of a shard's rows."""
    return f"{shard}.parquet"


def run_index(
    root: Root,
    states: list[ShardState],
    out: Path,
    options: IndexOptions,
    *,
    num_workers: int,
    progress: bool,
    fresh: bool,
) -> None:
    """Index the shards and put the catalogue into `out`, replacing what was there.

    Raises:
        ValueError: damaged shards, a key in two shards, nothing usable, or another run at work.
    """
    staging = out.with_name(f"{out.name}.partial")
    with _locked(staging):
        known = {**_states_of(out, options), **_resume(staging, options)}
        work = partial(_index_one, root, staging, out, options)
        jobs = [(state, not fresh and known.get(state.name) == state) for state in states]
        facts: dict[str, ShardFacts] = {}
        damaged: list[str] = []
        bar = sample_bar("index shards", len(states), progress)
        with bar as advance, open(staging / _JOURNAL, "a", encoding="utf-8") as journal:
            for done in map_processes(work, jobs, num_workers):
                if isinstance(done, str):
                    damaged.append(done)
                    advance(0)
                    continue
                facts[done.state.name] = done
                journal.write(json.dumps(asdict(done.state)) + "\n")
                journal.flush()
                advance(done.samples)
        if damaged:
            rest = [f"and {len(damaged) - _SHOWN} more"] if len(damaged) > _SHOWN else []
            raise ShardError("\n".join([*sorted(damaged)[:_SHOWN], *rest]))
        whole = [facts[state.name] for state in states]
        _check_ids(whole, root, staging)
        _write_manifest(staging, whole, options)
        _swap(staging, out, {part_name(state.name) for state in states})


def read_facts(part: Path) -> dict[str, Any]:
    """What a Parquet file says of itself: digest of its rows, `rejected` samples, `passed_over`."""
    return json.loads(pq.read_metadata(part).metadata[FACTS])


def _index_one(
    root: Root, staging: Path, out: Path, options: IndexOptions, job: tuple[ShardState, bool]
) -> ShardFacts | str:
    """In a worker: the shard's facts, or what is wrong with it."""
    state, unchanged = job
    part = staging / part_name(state.name)
    if unchanged:
        try:
            if not part.exists():
                _link(out / part.name, part)
            return _facts_of(part, state)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            part.unlink(missing_ok=True)  # damaged or gone: index again
    where = str(join(root, state.name))
    with local_copy(root, state.name) as path:
        try:
            index = index_shard(path, options.dataset, name=state.name, probe=options.probe)
        except ShardError as error:
            return str(error).replace(str(path), where)
        now = path.stat()
        if now.st_size != state.bytes or (state.mtime_ns and now.st_mtime_ns != state.mtime_ns):
            return f"{where}: changed while it was indexed; run the command again"
    table = pa.Table.from_pylist(index.rows, schema=SCHEMA)
    facts = {
        "digest": index.digest,
        "rejected": index.rejected,
        "passed_over": dict(sorted(index.passed_over.items())),
    }
    temporary = part.with_name(f".{part.name}.tmp")
    pq.write_table(
        table.replace_schema_metadata({FACTS: json.dumps(facts).encode()}),
        temporary,
        compression="zstd",
        write_page_checksum=True,
    )
    os.replace(temporary, part)
    return _facts_of(part, state)


def _facts_of(part: Path, state: ShardState) -> ShardFacts:
    facts = read_facts(part)
    file = pq.ParquetFile(part, page_checksum_verification=True)
    ids = file.read(columns=["sample_id"], use_threads=False)["sample_id"].to_numpy()
    rejected, passed_over = len(facts["rejected"]), facts["passed_over"]
    return ShardFacts(state, facts["digest"], rejected, passed_over, ids.tobytes())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # no hard links on this file system
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)


@contextmanager
def _locked(staging: Path) -> Iterator[None]:
    staging.mkdir(parents=True, exist_ok=True)
    file: BinaryIO = open(staging / _LOCK, "wb")  # noqa: SIM115 - the lock lives as long as it
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{staging}: another `longtake index` is at work there") from None
        yield


def _states_of(out: Path, options: IndexOptions) -> dict[str, ShardState]:
    """Shards of the present catalogue; none where it is absent, damaged or made otherwise."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        if {key: manifest[key] for key in asdict(options)} != asdict(options):
            return {}
        return {
            name: ShardState(name, entry["bytes"], entry["mtime_ns"])
            for name, entry in manifest["shards"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _resume(staging: Path, options: IndexOptions) -> dict[str, ShardState]:
    """Shards that a stopped run has done, in the journal written anew; other parts are removed."""
    states = {state.name: state for state in _read_journal(staging / _JOURNAL, options)}
    for part in staging.glob("*.parquet"):
        if part.name.removesuffix(".parquet") not in states:
            part.unlink()
    lines = [json.dumps(asdict(entry)) for entry in (options, *states.values())]
    temporary = staging / f"{_JOURNAL}.tmp"
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(temporary, staging / _JOURNAL)
    return states


def _read_journal(path: Path, options: IndexOptions) -> list[ShardState]:
    states = []
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
        if json.loads(first) == asdict(options):
            for line in lines:
                states.append(ShardState(**json.loads(line)))
    except (OSError, ValueError, TypeError):
        return states  # no journal, or the line at which the last run was killed
    return states


def _check_ids(facts: list[ShardFacts], root: Root, staging: Path) -> None:
    """Keys are unique over the dataset: compared by their 64-bit ids, which must be unique too."""
    ids = np.concatenate([np.frombuffer(f.ids, dtype=np.uint64) for f in facts])
    if not len(ids):
        parts = (staging / part_name(f.state.name) for f in facts)
        reasons = {entry["reason"] for part in parts for entry in read_facts(part)["rejected"]}
        raise ValueError(f"{root}: no usable sample in {len(facts)} shards: {sorted(reasons)[:3]}")
    ids.sort()
    repeated = ids[1:][ids[1:] == ids[:-1]]
    if not len(repeated):
        return
    places = []
    for entry in facts:
        rows = np.flatnonzero(np.frombuffer(entry.ids, dtype=np.uint64) == repeated[0])
        if len(rows):
            name = entry.state.name
            file = pq.ParquetFile(staging / part_name(name))
            keys = file.read(columns=["key"], use_threads=False)["key"]
            places += [(name, keys[int(row)].as_py()) for row in rows]
    (name, key), (other, other_key) = places[:2]
    if key == other_key:
        raise ValueError(
            f"{root}: key {key!r} is in {name} and in {other}; keys of a dataset must be unique"
        )
    raise ValueError(
        f"{root}: keys {key!r} in {name} and {other_key!r} in {other} have one 64-bit sample id; "
        "rename one, or give --dataset another name"
    )


def _write_manifest(folder: Path, facts: list[ShardFacts], options: IndexOptions) -> None:
    digests = [(f.state.name, f.digest) for f in facts]
    identity = json.dumps([SCHEMA_VERSION, options.dataset, digests])
    passed_over: Counter[str] = Counter()
    for entry in facts:
        passed_over.update(entry.passed_over)
    manifest = {
        **asdict(options),
        "fingerprint": xxhash.xxh3_128_hexdigest(identity.encode()),
        "passed_over": dict(sorted(passed_over.items())),
        "shards": {
            f.state.name: {
                "samples": f.samples,
                "bytes": f.state.bytes,
                "mtime_ns": f.state.mtime_ns,
                "digest": f.digest,
                "rejected": f.rejected,
            }
            for f in facts
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _swap(staging: Path, out: Path, parts: set[str]) -> None:
    for path in staging.iterdir():
        if path.name not in parts | {MANIFEST, _JOURNAL, _LOCK}:
            path.unlink()  # of shards that are gone, or half written
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    if out.exists():
        os.replace(out, old)
    os.replace(staging, out)
    shutil.rmtree(old, ignore_errors=True)
    for name in (_JOURNAL, _LOCK):
        (out / name).unlink()
