"""A folder of ordinary video files with captions.jsonl into indexed shards."""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rich.progress import track

from longtake.data.catalogue import Catalogue, build_catalogue, load_catalogue
from longtake.data.decode import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    DecodeError,
    VideoInfo,
    decode_clip,
    probe,
)
from longtake.data.randomness import derive_seed, uniform
from longtake.data.samples import SampleError, check_text, parse_meta
from longtake.data.shards import ShardWriter

CAPTIONS = "captions.jsonl"
_MAX_KEY_BYTES = 90  # a plain tar header holds names of 100
_EXTENSIONS = (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS)


@dataclass(frozen=True)
class PackReport:
    """What was packed: `skipped` lists (file or line, reason)."""

    catalogue: Catalogue
    packed: int
    skipped: list[tuple[str, str]]

    def summary(self) -> str:
        """Counts and every skip, for printing; names that are not UTF-8 are escaped."""
        lines = [f"packed {self.packed} clips into {self.catalogue.root}"]
        if self.skipped:
            lines.append(f"skipped {len(self.skipped)}:")
            lines += [f"  {file}: {reason}" for file, reason in self.skipped]
        lines += self.catalogue.rejections()
        return "\n".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")


def pack_folder(
    folder: Path | str,
    out: Path | str,
    captions_jsonl: Path | str | None = None,
    *,
    dataset: str | None = None,
    val_fraction: float = 0.0,
    max_samples: int = 500,
    max_bytes: int = 2**28,
    progress: bool = True,
) -> PackReport:
    """Pack the files that `captions_jsonl` (default: captions.jsonl in the folder) names.

    A line is {"file": ..., "caption": "..."} or "captions": {kind: text}; source, licence,
    source_id, split, truth and scores are kept. Bytes go in as they are. Files that cannot be read
    and lines that cannot be used are skipped with a reason. `val_fraction` of the sources get split
    "val" unless their line says otherwise. `out` appears when it is whole.

    Raises:
        ValueError: no folder, no captions, `out` is not empty, or nothing could be packed.
    """
    folder, out = Path(folder), Path(out)
    captions = Path(captions_jsonl) if captions_jsonl else folder / CAPTIONS
    _check_paths(folder, out, captions)
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must lie in 0..1, below 1")
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    skipped: list[tuple[str, str]] = []
    keys: Counter[str] = Counter()
    seen: set[str] = set()
    try:
        with ShardWriter(temporary, max_samples=max_samples, max_bytes=max_bytes) as writer:
            lines = captions.read_bytes().splitlines()
            for name, line in track(
                _numbered(lines), "pack", total=len(lines), disable=not progress
            ):
                try:
                    fields = _parse_line(line)
                    name = _file_name(fields)
                    if name in seen:
                        raise SampleError("listed twice")
                    seen.add(name)
                    ext, data, info = _read_video(folder, name)
                    meta = _meta(fields, name, info, val_fraction)
                except (SampleError, DecodeError) as error:
                    skipped.append((name, str(error)))
                    continue
                writer.write(_key(name, keys), {ext: data, "json": meta})
        skipped += [(name, f"no line in {captions.name}") for name in _uncaptioned(folder, seen)]
        if not keys:
            raise ValueError(f"{folder}: nothing could be packed: {skipped[:5]}")
        made = build_catalogue(temporary, dataset=dataset or out.resolve().name, progress=False)
        if len(made) + len(made.rejected) != keys.total():
            raise RuntimeError(
                f"{out}: {keys.total()} clips were packed, the catalogue knows of "
                f"{len(made)} and {len(made.rejected)} rejected ones"
            )
        if out.exists():
            out.rmdir()  # empty, as checked
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return PackReport(load_catalogue(out), keys.total(), skipped)


def _check_paths(folder: Path, out: Path, captions: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of videos")
    if not captions.is_file():
        raise ValueError(
            f'{captions}: missing; write a line {{"file": "clip.mp4", "caption": "..."}} per clip'
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not empty; give a new folder or remove it")


def _numbered(lines: list[bytes]) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"line {number}", line


def _parse_line(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise SampleError("caption is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise SampleError(f"is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise SampleError("is not a JSON object")
    check_text(fields)
    return fields


def _file_name(fields: dict[str, Any]) -> str:
    name = fields.get("file")
    if not isinstance(name, str) or not name:
        raise SampleError('has no "file"')
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise SampleError(f"file {name!r} must be a path inside the folder")
    return str(path)


def _read_video(folder: Path, name: str) -> tuple[str, bytes, VideoInfo]:
    ext = PurePosixPath(name).suffix.lower().lstrip(".")
    if ext not in _EXTENSIONS:
        raise SampleError(f"not a video or image file; known are {', '.join(_EXTENSIONS)}")
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise SampleError(f"cannot be read: {error.strerror}") from None
    info = probe(data)
    decode_clip(data, [0.0])  # a header can promise more than the decoder keeps
    return ext, data, info


def _meta(fields: dict[str, Any], name: str, info: VideoInfo, val_fraction: float) -> bytes:
    kept = ("captions", "caption", "source", "licence", "source_id", "split", "truth", "scores")
    meta = {key: fields[key] for key in kept if fields.get(key) is not None}
    if isinstance(meta.get("caption"), str) and "captions" not in meta:
        text = meta.pop("caption")
        meta["captions"] = {"dense": text, "short": text}
    source_id = str(meta.setdefault("source_id", name))
    # By source, never by clip: cuts of one piece of footage must not face each other.
    is_val = uniform(0, f"val split of {source_id}") < val_fraction
    meta.setdefault("split", "val" if is_val else "train")
    meta["fps"] = info.fps
    encoded = json.dumps(meta, ensure_ascii=False).encode("utf-8", "surrogatepass")
    parsed = parse_meta("json", encoded)
    for key in ("source_id", "split", "licence"):
        parsed.text(key)
    parsed.scores()
    return encoded


def _key(name: str, used: Counter[str]) -> str:
    """The file's path without its suffix, odd characters replaced, short enough for any tar."""
    path = PurePosixPath(name).with_suffix("")
    key = "/".join(re.sub(r"[^\w\-]", "_", part) for part in path.parts)
    if len(key.encode()) > _MAX_KEY_BYTES:
        key = f"{key[:20]}_{derive_seed(name):016x}"
    above, slash, base = key.rpartition("/")
    # Readers pass over names that begin with two underscores.
    key = f"{above}{slash}{base.lstrip('_') or 'clip'}"
    while used[key]:
        key += "_"
    used[key] += 1
    return key


def _uncaptioned(folder: Path, seen: set[str]) -> list[str]:
    found = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))]
    return [n for n in found if n.rsplit(".", 1)[-1].lower() in _EXTENSIONS and n not in seen]
