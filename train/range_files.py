"""Safetensors files of ranges: written in a stream that is hashed on its way, read by slices."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from longtake.train.strategy import StateRange

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK = 2**24  # bytes hashed or written at once


@dataclass(frozen=True)
class Placed:
    """Where [start, stop) of a tensor lies: under `key` in `file`."""

    file: str
    key: str
    start: int
    stop: int


class HashingWriter:
    """Writes a file and knows its sha256 and size; closing it waits until the disk has it."""

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by finish
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            self.sha256.update(part)
            while len(part):  # the kernel may take less than it is given
                written = self.file.write(part)
                part = part[written:]
        self.size += len(view)

    def __enter__(self) -> HashingWriter:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is None:
                os.fsync(self.file.fileno())
        finally:
            self.file.close()

    def stamp(self) -> dict[str, Any]:
        return {"sha256": self.sha256.hexdigest(), "bytes": self.size}


def range_key(piece: StateRange) -> str:
    return f"{piece.kind}/{piece.name}/{piece.start}"


def write_ranges(path: Path, ranges: Sequence[StateRange]) -> dict[str, Any]:
    """Writes CPU ranges as one safetensors file; returns its {"sha256", "bytes"}.

    The layout is that of the safetensors format: the header's length (u64, little-endian), the
    header (JSON: dtype, shape and byte offsets of every key), then the data.
    """
    header: dict[str, Any] = {}
    offset = 0
    for piece in ranges:
        size = piece.tensor.numel() * piece.tensor.element_size()
        header[range_key(piece)] = {
            "dtype": DTYPE_NAMES[piece.tensor.dtype],
            "shape": [piece.stop - piece.start],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with HashingWriter(path) as out:
        out.write(struct.pack("<Q", len(text)))
        out.write(text)
        for piece in ranges:
            out.write(memoryview(piece.tensor.contiguous().view(torch.uint8).numpy()))
    return out.stamp()


def write_bytes(path: Path, data: bytes) -> dict[str, Any]:
    """Writes a small file; returns its {"sha256", "bytes"}."""
    with HashingWriter(path) as out:
        out.write(data)
    return out.stamp()


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Makes renames within a folder survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RangeFiles:
    """Reads slices of the files of one folder; opened once, nothing is held in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened: dict[str, Any] = {}

    def read(self, places: Iterable[Placed], start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop), (stop - start,), out of the places that overlap them.

        Errors: ValueError when the places leave a gap.
        """
        result: torch.Tensor | None = None
        covered = 0
        for place in places:
            first, last = max(start, place.start), min(stop, place.stop)
            if first >= last:
                continue
            if place.file not in self.opened:
                self.opened[place.file] = safe_open(self.folder / place.file, framework="pt")
            stored = self.opened[place.file].get_slice(place.key)
            part = stored[first - place.start : last - place.start]
            if (first, last) == (start, stop):
                return part
            if result is None:
                result = torch.empty(stop - start, dtype=part.dtype)
            result[first - start : last - start] = part
            covered += last - first
        if result is None or covered != stop - start:
            raise ValueError(f"{self.folder} holds {covered} of {stop - start} elements asked for")
        return result
