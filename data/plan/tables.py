"""The compiled form of a dataset: one record for each eligible sample, memory-mapped.

A plan and its readers touch a few records a step, so neither opening nor resuming reads the
catalogue again: ten million samples open in a moment and cost memory only where they are used.
"""

import json
import os
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longtake.data.samples import LATENT_EXTENSION
from longtake.data.shards.storage import Root, parse_root

ROW = np.dtype(
    [
        ("sample_id", "<u8"),
        ("payload_offset", "<i8"),
        ("payload_size", "<i8"),
        ("meta_offset", "<i8"),
        ("meta_size", "<i8"),
        ("key_start", "<i8"),
        ("xxh3", "V16"),
        ("meta_xxh3", "V16"),
        ("duration", "<f4"),
        ("fps", "<f4"),
        ("frames", "<i4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("shard", "<i4"),
        ("key_size", "<i4"),
        ("texts_size", "<i4"),
        ("kinds", "<u2"),
        ("ext", "<u2"),
        ("meta_ext", "<u2"),
        ("latent", "?"),
    ]
)


FILES = {"rows": ROW, "keys": np.dtype(np.uint8), "bucket": np.dtype("<i2")}


class Record(NamedTuple):
    """One element of `rows`: the fields of ROW; offsets and sizes in bytes, hashes raw."""

    sample_id: int
    payload_offset: int
    payload_size: int
    meta_offset: int
    meta_size: int
    key_start: int
    xxh3: bytes
    meta_xxh3: bytes
    duration: float
    fps: float
    frames: int
    width: int
    height: int
    shard: int
    key_size: int
    texts_size: int
    kinds: int
    ext: int
    meta_ext: int
    latent: bool


assert Record._fields == ROW.names


@dataclass(frozen=True)
class TableInfo:
    """What holds for a whole table; `shards` are (name, bytes or None) in the catalogue's order."""

    root: str
    dataset: str
    fingerprint: str
    shards: list[tuple[str, int | None]]
    extensions: list[str]
    dropped: dict[str, int]
    rejected: int

    @property
    def holds_latents(self) -> bool:
        """Whether samples are cached latents."""
        return LATENT_EXTENSION in self.extensions


class FileArray:
    """Slices of an array in a file. A memory map would keep every page it ever touched resident,
    and those around them."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._dtype = dtype
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)

    def __getitem__(self, part: slice) -> np.ndarray:
        size = self._dtype.itemsize
        return np.frombuffer(
            os.pread(self._fd, (part.stop - part.start) * size, part.start * size), self._dtype
        )


class SampleTable:
    """Samples of one filtered dataset: `rows` (N,) of ROW, `bucket` (N,) int16 (-1: fits none), and
    the pieces that lanes are dealt: `bounds` (P + 1,), `counts` (P, buckets)."""

    def __init__(
        self,
        info: TableInfo,
        arrays: dict[str, np.ndarray],
        folder: Path | None = None,
    ) -> None:
        self.info, self._folder = info, folder
        self.rows, self.bucket = arrays["rows"], arrays["bucket"]
        self.bounds, self.counts = arrays["bounds"], arrays["counts"]
        # Single records and windows of buckets, a few at a time.
        self._records, self._keys, self.bucket_parts = self.rows, arrays["keys"], self.bucket
        if folder is not None:
            self._records, self._keys, self.bucket_parts = (
                FileArray(folder / f"{name}.bin", dtype) for name, dtype in FILES.items()
            )

    @cached_property
    def num_samples(self) -> int:
        """Samples that have a bucket."""
        return int(self.counts.sum())

    def record(self, row: int) -> Record:
        """All that is known of a sample, as Python values."""
        return Record._make(self._records[row : row + 1][0].item())

    def key(self, record: Record) -> str:
        """The sample's key."""
        start = record.key_start
        return self._keys[start : start + record.key_size].tobytes().decode()

    def shard(self, row: int) -> tuple[str, int | None]:
        """Name and, where it is known, size in bytes of the shard that holds the sample."""
        return self.info.shards[self.rows["shard"][row]]

    def texts(self, record: Record) -> list[dict[str, Any]]:
        """Further caption members, beyond `meta`: ext, offset, size, xxh3 (hex) of each."""
        if not record.texts_size:
            return []
        start = record.key_start + record.key_size
        return json.loads(self._keys[start : start + record.texts_size].tobytes())

    @cached_property
    def root(self) -> Root:
        """Where the shards lie."""
        return parse_root(self.info.root)

    def drops(self) -> list[str]:
        """Lines that say what the table holds and what was left out of it."""
        info = self.info
        lines = [f"{info.dataset}: {self.num_samples} samples"]
        if info.rejected:
            lines.append(f"  rejected when indexing: {info.rejected}")
        return lines + [f"  dropped, {why}: {n}" for why, n in info.dropped.items() if n]

    @staticmethod
    def is_whole(folder: Path) -> bool:
        """Whether a compiled table is there with all of its bytes."""
        try:
            sizes = json.loads((folder / "info.json").read_text(encoding="utf-8"))["sizes"]
            return all((folder / name).stat().st_size == size for name, size in sizes.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    @classmethod
    def open(cls, folder: Path) -> "SampleTable":
        """Map a compiled table that is whole."""
        fields = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        del fields["sizes"]
        fields["shards"] = [(name, size) for name, size in fields["shards"]]
        arrays = {
            name: np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r").view(np.ndarray)
            for name, dtype in FILES.items()
        }
        for name in ("bounds", "counts"):
            arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray)
        return cls(TableInfo(**fields), arrays, folder)

    def __reduce__(self) -> Any:
        # A worker maps the files itself; a pickled memmap would be a copy of all of it.
        if self._folder is not None:
            return SampleTable.open, (self._folder,)
        return super().__reduce__()
