"""Draw videos: prompts, and frames that a task gives → frames → files."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress, TaskID

from longtake.data.decode import encode_image, encode_video
from longtake.data.randomness import derive_seed
from longtake.models.sampler import SamplerConfig
from longtake.train.caption_rows import known_numbers
from longtake.train.checks import require
from longtake.train.codec import load_codec
from longtake.train.frame_rate import drawn_rate
from longtake.train.given import fitting_buckets
from longtake.train.given_files import read_given
from longtake.train.painter import Painter, noise_for, sampler_of
from longtake.train.playback import IMAGE_FPS, enlarge, to_frames, viewing_mp4
from longtake.train.runs import LoadedDiT, load_dit, pick_device
from longtake.train.schema import DiTRun


@dataclass(frozen=True)
class SampleRequest:
    """What to draw. None stands for the run's own value (`samples.*`, the longest bucket that
    fits the task, the rate of its clips)."""

    prompts: Sequence[str]
    num_videos: int = 1  # per prompt
    task: str = "t2v"
    given: Sequence[str] = ()  # images or clips the task gives, in order: FILE or FILE@FRAME
    given_noise: float = 0.0  # level at which they are shown, in [0, 1)
    negative: str | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)  # told behind the prompts
    frames: int | None = None
    size: tuple[int, int] | None = None  # (height, width)
    fps: float | None = None
    upscale: int | None = None  # whole factor of the written files; 1 keeps 4:4:4 pixels as drawn
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    solver: str | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        level, fps = self.given_noise, self.fps
        require(0 <= level < 1, f"given_noise={level} must lie in [0, 1)")
        is_rate = fps is None or (math.isfinite(fps) and fps > 0)
        require(is_rate, f"fps={fps} must be positive frames per second")
        for word, value in self.numbers.items():
            require(math.isfinite(value), f"numbers.{word}={value} must be finite")
        for name in ("num_videos", "batch_size"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1")


def sample_to_files(
    path: Path,
    request: SampleRequest,
    out: Path | None = None,
    *,
    weights: str = "ema",
    vae: Path | None = None,
    device: str = "auto",
) -> list[Path]:
    """Draw and write NNN-words.mp4 (png for one frame) with a .json beside each; their paths.

    Video i of every prompt starts from the same noise, so prompts can be compared.
    """
    run = load_dit(path, weights, pick_device(device))
    codec = load_codec(run.config, folder=run.place.folder, vae=vae, device=pick_device(device))
    sampler = sampler_of(
        run.config, request.steps, request.guidance_scale, request.shift, request.solver
    )
    painter = Painter(run, codec, sampler, precision=run.config.engine.precision)
    painter.warn_of_cut(request.prompts)
    bucket = fitting_buckets(run.config, [request.task], codec.strides[0])[0]
    frames = request.frames or bucket.frames
    height, width = request.size or (bucket.height, bucket.width)
    shape = codec.latent_shape(frames, height, width)
    run.dit.config.grid(shape[1:])
    fps = drawn_rate(run.config, frames) if request.fps is None else request.fps
    given = read_given(
        *(request.task, request.given, run.config, codec, (frames, height, width), fps),
        level=request.given_noise,
    )
    numbers = numbers_of(request, run.config, fps)
    jobs = [(prompt, n) for prompt in request.prompts for n in range(request.num_videos)]
    out = out or run.place.folder / "samples" / "command"
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    with Progress() as progress:
        bar = progress.add_task("sample", total=len(jobs) * sampler.steps)
        for start in range(0, len(jobs), request.batch_size):
            batch = jobs[start : start + request.batch_size]
            noise = torch.stack([noise_for(derive_seed(request.seed, n), shape) for _, n in batch])
            video = painter.draw(
                *([prompt for prompt, _ in batch], noise, given),
                on_step=partial(_advance, progress, bar, len(batch)),
                negative=request.negative,
                numbers=[numbers] * len(batch),
            )
            for index, ((prompt, n), pixels) in enumerate(zip(batch, video, strict=True), start):
                about = {"prompt": prompt, "video": n, **describe(request, run, sampler, fps)}
                stem = out / f"{index:03d}-{slug(prompt)}"
                paths.append(write_clip(stem, to_frames(pixels), fps, request.upscale, about))
    return paths


def describe(
    request: SampleRequest, run: LoadedDiT, sampler: SamplerConfig, fps: float
) -> dict[str, object]:
    """How the videos of a request were drawn, for the .json beside each."""
    return {
        "task": request.task,
        "given": list(request.given),
        "numbers": dict(request.numbers),
        "fps": fps,
        "negative": request.negative,
        "seed": request.seed,
        "step": run.place.step,
        "weights": run.weights,
        **asdict(sampler),
    }


def numbers_of(request: SampleRequest, config: DiTRun, fps: float) -> dict[str, float]:
    """What to tell behind the prompts: what the request says, and the rate of the video.

    ValueError for a number that the run was never told.
    """
    sources = config.numbers.told
    for name in request.numbers:
        if name not in sources:
            known = ", ".join(sources) or "nothing"
            raise ValueError(f"--tell {name}: the run was told {known} (numbers.sources)")
    told = known_numbers(config, fps) | dict(request.numbers)
    return {name: told[name] for name in sources if name in told}


def _advance(progress: Progress, bar: TaskID, count: int, step: int) -> None:
    progress.advance(bar, count)


def write_clip(
    stem: Path, frames: np.ndarray, fps: float, upscale: int | None, about: dict[str, object]
) -> Path:
    """Write one clip and its .json; each file appears whole."""
    if len(frames) == 1:
        path, data = stem.with_suffix(".png"), encode_image(enlarge(frames, upscale)[0])
    elif upscale == 1:
        path, data = stem.with_suffix(".mp4"), encode_video(frames, fps)
    else:
        path, data = stem.with_suffix(".mp4"), viewing_mp4(frames, fps or IMAGE_FPS, upscale)
    for target, content in (
        (stem.with_suffix(".json"), (json.dumps(about, indent=1) + "\n").encode()),
        (path, data),
    ):
        scratch = target.with_name(target.name + ".tmp")
        scratch.write_bytes(content)
        os.replace(scratch, target)
    return path


def slug(prompt: str) -> str:
    """The first words of a prompt as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "prompt"
