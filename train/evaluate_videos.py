"""`longtake evaluate --videos FOLDER`: score videos that any program drew for world captions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from rich.progress import track

from longtake.data.decode import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    VideoInfo,
    decode_clip,
    encode_video,
    frame_times,
    pixel_format,
    probe,
)
from longtake.data.world import (
    FAMILIES,
    SPLITS,
    Shapes,
    WorldClip,
    make_clip,
    read_caption,
    score_frames,
)
from longtake.data.world.clips import check_request
from longtake.data.world.describe import Reading
from longtake.data.world.families import Canvas
from longtake.data.world.given import position_error, score_given
from longtake.data.world.language import plain
from longtake.train.card import CONTINUATION, Card, ClipScores, build_card, write_card, write_rows
from longtake.train.evaluate import CARD, ROWS, EvaluationResult
from longtake.train.playback import Footage, read_footage
from longtake.train.run_folder import check_replaceable, written_whole

PROMPTS, LEFT_OUT = "prompts.jsonl", "left_out.jsonl"
# True clips per family, shape and pixel format: so many pixels, but not fewer or more than these.
CEILING_PIXELS, CEILING_CLIPS = 2**25, (4, 32)
FPS_TOLERANCE = 0.01  # share of the rate
SUBSAMPLED = {"420": "yuv420p", "nv12": "yuv420p", "p010": "yuv420p", "422": "yuv422p"}
MAX_PIXELS = 2**28  # of all frames: 3 GB while they are searched
JITTER = 0.25  # of a frame, by which times may be off


@dataclass(frozen=True)
class Asked:
    """What a video was asked to show. None: the prompt file or sidecar does not say.

    With seed and name the true clip can be made again; `given` are the frames of it that the
    program was given. ValueError for a field that is of another kind.
    """

    name: str  # file stem
    prompt: str
    family: str | None = None
    split: str = "videos"
    task: str = "t2v"
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    seed: int | None = None
    given: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        kinds = {"prompt": str, "split": str, "task": str, "family": (str, NoneType)}
        kinds |= dict.fromkeys(("frames", "height", "width", "seed"), (int, NoneType))
        kinds["fps"] = (int, float, NoneType)
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}={getattr(self, name)!r} is of the wrong kind")
        for name in ("frames", "height", "width", "fps"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive")
        if not all(isinstance(index, int) and index >= 0 for index in self.given):
            raise ValueError(f"given={list(self.given)} must be numbers of frames")


class LeftOut(Exception):
    """A video that cannot be scored; the text is the reason, alike for all of its kind."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail or reason


def evaluate_videos(
    folder: Path, out: Path | None = None, *, prompts: Path | None = None, name: str | None = None
) -> EvaluationResult:
    """Score every video of a folder against its caption; write card, rows and what was left out.

    Captions come from `prompts` (default: FOLDER/prompts.jsonl; rows with `key` or `file` and
    `prompt`, as `longtake world --prompts` writes them), else from NAME.json (`prompt` or
    `caption`) or NAME.txt beside NAME.mp4. What a row says of frames, size and fps must hold. The
    ceiling is what true clips score in the videos' own pixel format.

    ValueError when there is no video, or none of them can be scored; everything else is counted
    by reason in the card and named in left_out.jsonl.
    """
    if not folder.is_dir():
        raise ValueError(f"--videos {folder}: no such folder")
    folder = folder.resolve()
    extensions = {f".{e}" for e in (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS)}
    captions = {".txt", ".json", ".jsonl"}
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in captions)
    if not any(path.suffix.lower() in extensions for path in found):
        raise ValueError(f"--videos {folder}: holds no video ({', '.join(sorted(extensions))})")
    out = (out or folder.with_name(f"{folder.name}-scores")).resolve()
    if folder.is_relative_to(out):
        raise ValueError(f"--out {out}: would replace the folder of the videos; name another one")
    check_replaceable(out, CARD)
    listed, problems = read_prompts(prompts or folder / PROMPTS, needed=prompts is not None)
    # Of other files only those with a caption were meant.
    files = [
        path
        for path in found
        if path.suffix.lower() in extensions or _is_captioned(path, folder, listed)
    ]
    ceilings = Ceilings()
    rows: list[ClipScores] = []
    taken: dict[str, Path] = {}  # key of a prompt -> the video that answers it
    for path in track(files, description="evaluate"):
        try:
            key = _key_of(path, folder, listed)
            if path.suffix.lower() not in extensions:
                raise LeftOut(f"a file of a kind that is not read: {path.suffix}", path.name)
            if key is not None and (other := taken.setdefault(key, path)) != path:
                raise LeftOut("a second file for one prompt", f"{key}: {other.name} came first")
            asked = listed[key] if key is not None else _beside(path)
            rows.append(_score_file(path, asked, name or folder.name, ceilings))
        except LeftOut as error:
            problems.append((path.relative_to(folder).as_posix(), str(error), error.detail))
    problems += [
        (key, "no video for this prompt", asked.prompt)
        for key, asked in listed.items()
        if key not in taken
    ]
    left_out = Counter(reason for _, reason, _ in problems)
    if not rows:
        counts = "; ".join(f"{count} x {reason}" for reason, count in left_out.most_common())
        first = "\n".join(f"  {file}: {detail}" for file, _, detail in problems[:5])
        raise ValueError(f"--videos {folder}: no video could be scored ({counts}):\n{first}")
    about = {"run": name or folder.name, "videos": len(files), "scored": len(rows)}
    card = build_card(sorted(rows, key=_order), about, dict(left_out.most_common()))
    _write(out, card, rows, problems)
    return EvaluationResult(card, out)


def _order(row: ClipScores) -> tuple[str, str, str, str]:
    return row.task, row.split, row.family, row.key


def read_prompts(
    path: Path, *, needed: bool
) -> tuple[dict[str, Asked], list[tuple[str, str, str]]]:
    """Rows of a prompts.jsonl by file name or key, and lines that are no such row: name, reason and
    what is wrong. Nothing where the file is absent and not needed.
    """
    if not path.is_file():
        if needed:
            raise ValueError(f"--prompts-file {path}: no such file")
        return {}, []
    found: dict[str, Asked] = {}
    problems: list[tuple[str, str, str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            key = str(row.get("file") or row["key"])
            asked = asked_of(Path(key).stem if "file" in row else key, row)
            if key in found:
                raise ValueError(f"{key} was already asked for in an earlier line")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            line = f"{path.name}:{number}", "not a row with key and prompt", str(error)
            problems.append(line)
        else:
            found[key] = asked
    return found, problems


def asked_of(name: str, row: Mapping[str, Any]) -> Asked:
    """A prompt row or sidecar as `Asked`; KeyError without a prompt."""
    prompt = row["prompt"] if "prompt" in row else row["caption"]
    known = {key: row.get(key) for key in ("family", "frames", "height", "width", "fps", "seed")}
    return Asked(
        name=name,
        prompt=prompt,
        split=row.get("split") or "videos",
        task=row.get("task") or "t2v",
        given=tuple(row.get("given") or ()),
        **known,
    )


def _key_of(path: Path, folder: Path, listed: Mapping[str, Asked]) -> str | None:
    """The prompt row of a file: by its path in the folder, its name, or its stem."""
    inside = path.relative_to(folder)
    names = (inside.as_posix(), inside.with_suffix("").as_posix(), path.name, path.stem)
    return next((name for name in names if name in listed), None)


def _is_captioned(path: Path, folder: Path, listed: Mapping[str, Asked]) -> bool:
    beside = (path.with_suffix(suffix).is_file() for suffix in (".json", ".txt"))
    return _key_of(path, folder, listed) is not None or any(beside)


def _beside(path: Path) -> Asked:
    """The caption beside a file; LeftOut without one."""
    sidecar, text = path.with_suffix(".json"), path.with_suffix(".txt")
    try:
        if sidecar.is_file():
            return asked_of(path.stem, json.loads(sidecar.read_text(encoding="utf-8-sig")))
        if text.is_file():
            return Asked(path.stem, text.read_text(encoding="utf-8-sig").strip())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LeftOut(
            "no prompt in the .json or .txt beside it", f"{path.name}: {error}"
        ) from error
    raise LeftOut("no caption: neither in prompts.jsonl nor beside it as .json or .txt")


def _score_file(path: Path, asked: Asked, program: str, ceilings: Ceilings) -> ClipScores:
    try:
        reading = read_caption(asked.prompt, asked.family)
    except ValueError as error:
        raise LeftOut("caption outside the world's grammar", str(error)) from error
    if not reading.expect:
        raise LeftOut("caption that asks for nothing", repr(asked.prompt))
    footage, stored = _read(path, asked, reading)
    frames = footage.frames
    length, height, width = frames.shape[:3]
    canvas = Canvas(length, height, width, footage.fps, asked.split)
    drawn, off = score_frames(frames, reading.expect), None
    if asked.given:
        truth = _true_clip(asked, reading, canvas).frames
        drawn |= score_given(frames, truth, asked.given)
        off = position_error(frames, truth, asked.given) if CONTINUATION in drawn else None
    levels = reading.levels(canvas)
    return ClipScores(
        weights=program,
        task=asked.task,
        split=asked.split,
        family=reading.family,
        key=path.stem,
        prompt=asked.prompt,
        drawn=drawn,
        ceiling=ceilings.of(reading, canvas, stored),
        truth={},
        chance={score: levels.get(score, (0.0, 0.0))[0] for score in drawn},
        blind={score: levels.get(score, (0.0, 0.0))[1] for score in drawn},
        position_error=off,
    )


def _read(path: Path, asked: Asked, reading: Reading) -> tuple[Footage, str]:
    """Every frame of a file and its pixel format; LeftOut when it is damaged, or not what it was
    asked to be. Headers are checked first: a small file can hold a great many frames."""
    try:
        data = path.read_bytes()
        info = probe(data)
        _check(asked, info, reading)
        if info.frames > 1:
            steps = np.diff(frame_times(data)) * info.fps
            if abs(steps - 1).max() > JITTER:
                raise LeftOut(
                    "variable frame rate", f"steps of {steps.min():.2f} to {steps.max():.2f}"
                )
        return read_footage(data), pixel_format(data)
    except (OSError, ValueError) as error:
        raise LeftOut("file that cannot be decoded", str(error)) from error


def _check(asked: Asked, info: VideoInfo, reading: Reading) -> None:
    """LeftOut unless the video has the length, size and rate that its prompt says."""
    if asked.frames is not None and info.frames != asked.frames:
        raise LeftOut("length other than asked", f"{info.frames} frames, asked for {asked.frames}")
    size = asked.height or info.height, asked.width or info.width
    if (info.height, info.width) != size:
        detail = f"{info.height}x{info.width}, asked for {size[0]}x{size[1]}"
        raise LeftOut("size other than asked", detail)
    if info.frames > 1 and asked.fps and abs(info.fps / asked.fps - 1) > FPS_TOLERANCE:
        raise LeftOut("rate other than asked", f"{info.fps:g} fps, asked for {asked.fps:g}")
    shape, family = f"{info.frames}x{info.height}x{info.width}", FAMILIES[reading.family]
    least = max(family.min_frames, family.forms[reading.form].min_frames)
    if info.frames < least or min(info.height, info.width) < family.min_side:
        needed = f"{asked.prompt!r} needs {least} frames of {family.min_side} px"
        raise LeftOut("shorter or smaller than its caption needs", f"{shape}, {needed}")
    if info.frames * info.height * info.width > MAX_PIXELS:
        raise LeftOut("too large to be scored", f"{shape}, more than {MAX_PIXELS} pixels")


def _refused(family: str, canvas: Canvas) -> str:
    """Why the world cannot draw a clip of the family on this canvas; "" where it can."""
    shapes = Shapes(((canvas.height, canvas.width),), (canvas.frames,), (canvas.fps,))
    try:
        check_request([family], "val", shapes)
    except ValueError as error:
        return str(error)
    return ""


def _true_clip(asked: Asked, reading: Reading, canvas: Canvas) -> WorldClip:
    """The clip whose frames were given, made again from seed and key; LeftOut if they are not
    known."""
    index = asked.name.rpartition("-")[2]
    if asked.seed is None or not index.isdecimal() or asked.split not in SPLITS:
        raise LeftOut("given frames without seed, split and key of their true clip", asked.name)
    if max(asked.given) >= canvas.frames:
        raise LeftOut(
            "given frames behind the end", f"{max(asked.given)} of {canvas.frames} frames"
        )
    if refused := _refused(reading.family, canvas):
        raise LeftOut("given frames of a clip that the world cannot draw", refused)
    clip = make_clip(
        asked.seed,
        asked.split,
        int(index),
        families=[reading.family],
        frames=canvas.frames,
        height=canvas.height,
        width=canvas.width,
        fps=asked.fps or canvas.fps,
    )
    if plain(asked.prompt) not in map(plain, clip.captions.values()):
        raise LeftOut("given frames of another clip than seed and key say", asked.name)
    return clip


class Ceilings:
    """What true clips of the world score after H.264 in a video's pixel format.

    4:2:0 halves the resolution of colour and can destroy small saturated shapes: no generator is
    to blame for that.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], dict[str, float]] = {}

    def of(self, reading: Reading, canvas: Canvas, pixel_format: str) -> dict[str, float]:
        """Mean scores over true clips of the family; {} where the world has none such."""
        if _refused(reading.family, canvas):
            return {}
        key = reading.family, canvas, pixel_format
        if key not in self._known:
            self._known[key] = self._measure(reading.family, canvas, pixel_format)
        return {name: v for name, v in self._known[key].items() if name in reading.expect}

    def _measure(self, family: str, canvas: Canvas, pixel_format: str) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        shape = {"frames": canvas.frames, "height": canvas.height, "width": canvas.width}
        split = canvas.split if canvas.split in SPLITS else "val"
        least, most = CEILING_CLIPS
        pixels = canvas.frames * canvas.height * canvas.width
        for index in range(min(max(CEILING_PIXELS // pixels, least), most)):
            clip = make_clip(0, split, index, families=[family], fps=canvas.fps, **shape)
            frames = _through(clip, pixel_format)
            for name, value in score_frames(frames, clip.truth["expect"]).items():
                found.setdefault(name, []).append(value)
        return {name: float(np.mean(values)) for name, values in found.items()}


def _through(clip: WorldClip, pixel_format: str) -> np.ndarray:
    """The clip after H.264 with the chroma resolution of `pixel_format`."""
    chroma = next((name for mark, name in SUBSAMPLED.items() if mark in pixel_format), "yuv444p")
    if len(clip.frames) == 1 and chroma == "yuv444p":
        return clip.frames  # a still picture: nothing was lost
    data = encode_video(clip.frames, clip.fps, pixel_format=chroma)
    times = [index / clip.fps for index in range(len(clip.frames))]
    return decode_clip(data, times)


def _write(
    out: Path, card: Card, rows: list[ClipScores], problems: list[tuple[str, str, str]]
) -> None:
    """card.json, clips.parquet and left_out.jsonl; the folder appears whole."""
    with written_whole(out) as scratch:
        write_rows(rows, scratch / ROWS)
        write_card(card, scratch / CARD)
        with (scratch / LEFT_OUT).open("w", encoding="utf-8") as file:
            for name, reason, detail in problems:
                row = {"file": name, "reason": reason, "detail": detail}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
