"""Images and clips from files, as what a task gives to `longtake sample`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from longtake.data.decode import decode_clip, probe
from longtake.data.transforms import covering_size, crop_clip, to_float
from longtake.models.conditioning import GivenFrames
from longtake.train.codec import Codec
from longtake.train.painter import GivenClips
from longtake.train.schema import DiTRun

Value = TypeVar("Value")

FROM_THE_END = {"extend_forward": (0,), "join": (0,), "first_last": (1,)}
"""Files of a task whose last frames are taken: of the others it is the first ones."""


@dataclass(frozen=True)
class GivenFile:
    """A file to be shown from frame `at` of the video on; None leaves that to the task."""

    path: Path
    at: int | None

    @classmethod
    def parse(cls, text: str) -> GivenFile:
        """FILE or FILE@FRAME."""
        name, sign, number = text.rpartition("@")
        placed = bool(sign) and number.isdigit()
        return cls(Path(name if placed else text), int(number) if placed else None)


def read_given(
    task: str,
    files: Sequence[str],
    config: DiTRun,
    codec: Codec,
    shape: tuple[int, int, int],
    fps: float,
    level: float = 0.0,
) -> GivenClips | None:
    """What the task gives to videos of pixels (T, H, W) from these files, None where nothing.

    ValueError for a task that the run was not trained on, and files that are too many, too few or
    too short for it.
    """
    check_task(config, task)
    patch, length = config.model.patch_size[0], codec.latent_shape(*shape)[1]
    wanted = codec.given(task, length, patch)
    named = [GivenFile.parse(text) for text in files]
    is_placed = bool(wanted.runs and named) and all(file.at is not None for file in named)
    if is_placed:
        named.sort(key=lambda file: file.at or 0)
    sources = [Source(file.path, fps, shape[1:]) for file in named]
    if is_placed:
        wanted = _placed(named, sources, codec, length, patch)
    if len(named) != len(wanted.runs):
        counts = [len(codec.pixel_frames(GivenFrames((run,)))) for run in wanted.runs]
        raise ValueError(
            f"task {task} takes {len(counts)} files of {counts} frames for a video of {shape[0]}, "
            f"got {len(named)}; other places are given as FILE@FRAME"
        )
    if not wanted.runs:
        return None
    if codec.has_channels:
        why = f"given frames are channels with model.in_channels={config.model.in_channels}"
        if level:
            raise ValueError(f"--given-noise {level} must be 0: {why}")
        between = [run.start for run in wanted.runs if run.start and run.stop < length]
        if between and codec.vae is not None:
            raise ValueError(
                f"--given …@{between[0] * codec.strides[0]}: only the beginning and the end of "
                f"{shape[0]} frames can be given, {why}"
            )
    video = torch.zeros(3, *shape)
    for number, (run, source) in enumerate(zip(wanted.runs, sources, strict=True)):
        frames = codec.pixel_frames(GivenFrames((run,)))
        is_end = number in FROM_THE_END.get(task, ()) and named[number].at is None
        video[:, frames] = source.read(len(frames), from_end=is_end)
    return GivenClips(video[None], wanted, level)


def _placed(
    named: Sequence[GivenFile],
    sources: Sequence[Source],
    codec: Codec,
    length: int,
    patch: int,
) -> GivenFrames:
    """Runs of latent frames where the files are asked to be, as long as they last."""
    time, runs, free = codec.strides[0], [], 0
    for file, source in zip(named, sources, strict=True):
        at = file.at or 0
        count = ((source.num_frames - 1) // time + 1) // patch * patch
        run = range(at // time, min(at // time + count, length))
        if at % (time * patch) or not run:
            raise ValueError(
                f"{file.path}@{at}: must start at a multiple of {time * patch} within the video "
                f"and last {(patch - 1) * time + 1} frames, it has {source.num_frames}"
            )
        if run.start < free:
            raise ValueError(
                f"{file.path}@{at}: must start at {free * time} or later, behind the file before"
            )
        runs.append(run)
        free = run.stop
    return GivenFrames.of(runs, codec.vae is not None, codec.has_channels)


def check_task(config: DiTRun, task: str) -> None:
    """ValueError when the run was not trained on the task."""
    if task not in config.trained_tasks:
        known = ", ".join(config.trained_tasks)
        raise ValueError(f"task {task}: the run was trained on {known} only (tasks.{task}=0)")


class Source:
    """Frames of a file at `fps`, resized and cropped to (height, width)."""

    def __init__(self, path: Path, fps: float, size: tuple[int, int]) -> None:
        """ValueError for a file that is missing or cannot be read."""
        if not path.is_file():
            raise ValueError(f"--given {path}: no such file")
        self.path, self.fps, self.size = path, fps, size
        self.data = path.read_bytes()
        self.info = self._checked(lambda: probe(self.data))
        rate = self.info.fps  # 0 for images
        self.num_frames = max(round(self.info.frames / rate * fps), 1) if rate else 1

    def read(self, count: int, *, from_end: bool) -> Tensor:
        """`count` frames (3, count, H, W) in [-1, 1]; ValueError where there are fewer."""
        if count > self.num_frames:
            raise ValueError(
                f"--given {self.path}: has {self.num_frames} frames at {self.fps:g} per second, "
                f"{count} are needed"
            )
        start = self.num_frames - count if from_end else 0
        times = [(start + number) / self.fps for number in range(count)]
        cover = covering_size(self.info.height, self.info.width, *self.size)
        frames = self._checked(lambda: decode_clip(self.data, times, size=cover))
        return to_float(crop_clip(frames, *self.size, (0.5, 0.5)))

    def _checked(self, work: Callable[[], Value]) -> Value:
        try:
            return work()
        except ValueError as error:
            raise ValueError(f"--given {self.path}: {error}") from error
