"""What a folder of clips offers to pack: files with their captions, metadata and keys."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from longtake.data.decode import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from longtake.data.randomness import derive_seed, uniform
from longtake.data.samples import SampleError, check_text, parse_meta

CAPTIONS = "captions.jsonl"
_MAX_KEY_BYTES = 90  # a plain tar header holds names of 100
_EXTENSIONS = (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS)
_KEPT = ("captions", "caption", "source", "licence", "source_id", "split", "truth", "scores")


@dataclass(frozen=True)
class Source:
    """A file and the JSON line that describes it, or the reason why it cannot be packed."""

    name: str
    line: bytes
    reason: str | None = None

    @property
    def ext(self) -> str:
        """Lower-case, without the dot."""
        return _ext(self.name)

    def meta(self, val_fraction: float, facts: dict[str, Any]) -> bytes:
        """key.json: the line's fields, a split by source, and `facts`.

        Raises:
            SampleError: a field cannot be used.
        """
        fields = _parse_line(self.line)
        meta = {key: fields[key] for key in _KEPT if fields.get(key) is not None}
        if "captions" in meta:
            meta.pop("caption", None)
        elif isinstance(text := meta.pop("caption", None), str):
            meta["captions"] = {"dense": text, "short": text}
        elif text is not None:
            raise SampleError("caption is not a text")
        source_id = str(meta.setdefault("source_id", self.name))
        # By source, never by clip: cuts of one piece of footage must not face each other.
        is_val = uniform(0, f"val split of {source_id}") < val_fraction
        meta.setdefault("split", "val" if is_val else "train")
        encoded = json.dumps(meta | facts, ensure_ascii=False).encode("utf-8", "surrogatepass")
        parsed = parse_meta("json", encoded)
        for key in ("source_id", "split", "licence"):
            parsed.text(key)
        parsed.scores()
        return encoded


def find_sources(folder: Path, captions: Path | None) -> list[Source]:
    """In the order of the captions; media files that nothing describes come last, with a reason.

    `captions` defaults to captions.jsonl in the folder and, where there is none, to clip.json or
    clip.txt beside clip.mp4.

    Raises:
        ValueError: no captions at all.
    """
    media = [
        name
        for name in (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")))
        if _ext(name) in _EXTENSIONS
    ]
    lines = captions or folder / CAPTIONS
    if lines.is_file():
        sources = list(_listed(lines.read_bytes().splitlines()))
        seen = {source.name for source in sources}
        absent = f"no line in {lines.name}"
        sources += [Source(name, b"", absent) for name in media if name not in seen]
        return sources
    sources = [_beside(folder, name) for name in media] if captions is None else []
    if not any(source.line for source in sources):
        raise ValueError(
            f'{lines}: missing; write a line {{"file": "clip.mp4", "caption": "..."}} per clip, '
            "or clip.txt or clip.json beside each clip.mp4"
        )
    return sources


def make_key(name: str, suffix: str, used: Counter[str]) -> str:
    """The file's path without its extension, odd characters replaced, short enough for any tar."""
    path = PurePosixPath(name).with_suffix("")
    key = "/".join(re.sub(r"[^\w\-]", "_", part) for part in path.parts)
    if len(key.encode()) > _MAX_KEY_BYTES - len(suffix):
        key = f"{key[:20]}_{derive_seed(name):016x}"
    above, slash, base = key.rpartition("/")
    # Readers pass over names that begin with two underscores.
    key = f"{above}{slash}{base.lstrip('_') or 'clip'}{suffix}"
    while used[key]:
        key += "_"
    used[key] += 1
    return key


def _listed(lines: list[bytes]) -> Iterator[Source]:
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = f"line {number}"
        try:
            name = _file_name(_parse_line(line))
            if name in seen:
                raise SampleError("listed twice")
            seen.add(name)
            yield _checked(Source(name, line))
        except SampleError as error:
            yield Source(name, line, str(error))


def _checked(source: Source) -> Source:
    """Before any work on the file: would its line do?"""
    if source.ext not in _EXTENSIONS:
        raise SampleError(f"not a video or image file; known are {', '.join(_EXTENSIONS)}")
    source.meta(0.0, {})
    return source


def _beside(folder: Path, name: str) -> Source:
    path = folder / name
    fields: dict[str, Any] = {}
    found = False
    try:
        if path.with_suffix(".json").is_file():
            found, fields = True, _parse_line(path.with_suffix(".json").read_bytes())
        if path.with_suffix(".txt").is_file():
            found, text = True, path.with_suffix(".txt").read_bytes()
            if not fields.get("captions") and not fields.get("caption"):
                fields["caption"] = text.decode("utf-8-sig").strip()
        if not found:
            return Source(name, b"", "neither clip.json nor clip.txt beside it")
        return _checked(Source(name, json.dumps(fields).encode()))
    except UnicodeDecodeError:
        return Source(name, b"{}", "caption is not UTF-8")
    except (SampleError, OSError) as error:
        return Source(name, b"{}", str(error))


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


def _ext(name: str) -> str:
    return PurePosixPath(name).suffix.lower().lstrip(".")
