"""Draw videos: prompts (and a first frame for i2v) → frames → files."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress, TaskID
from torch import Tensor

from longtake.data.decode import decode_clip, encode_image, encode_video, probe
from longtake.data.randomness import derive_seed, generator
from longtake.data.transforms import covering_size, crop_clip, to_float
from longtake.models.conditioning import given_mask
from longtake.models.sampler import Given, SamplerConfig, TextInput, sample
from longtake.models.text import Tokenizer
from longtake.train.codec import Codec, load_codec
from longtake.train.playback import (
    IMAGE_FPS,
    enlarge,
    to_frames,
    viewing_mp4,
)
from longtake.train.runs import LoadedDiT, load_dit, pick_device
from longtake.train.schema import DiTRun

DEFAULT_FPS = 8.0


@dataclass(frozen=True)
class SampleRequest:
    """What to draw. None stands for the run's own value (`samples.*`, first bucket, `data.fps`)."""

    prompts: Sequence[str]
    num_videos: int = 1  # per prompt
    image: Path | None = None  # first frame of every video (i2v)
    frames: int | None = None
    size: tuple[int, int] | None = None  # (height, width)
    fps: float | None = None
    upscale: int | None = None  # whole factor of the written files; 1 keeps 4:4:4 pixels as drawn
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    batch_size: int = 8


class Painter:
    """Draws batches with one run: text encoder, DiT, sampler, codec."""

    def __init__(
        self, run: LoadedDiT, codec: Codec, sampler: SamplerConfig, *, precision: str = "fp32"
    ) -> None:
        """`precision`: fp32, or bf16 for autocast as in training."""
        self.run, self.codec, self.sampler = run, codec, sampler
        self.tokenizer = Tokenizer(run.config.text)
        self.device = next(run.dit.parameters()).device
        self.precision = precision

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        noise: Tensor,
        first_frames: Tensor | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Pixels (B, 3, T, H, W) in [-1, 1] from noise (B, C, T', H', W') of the latents' shape.

        first_frames (B, 3, 1, H, W) in [-1, 1] are given (i2v) and kept.
        """
        with self._autocast():
            text, negative = self._encode(prompts), None
            if self.sampler.guidance_scale != 1:
                negative = self._encode([""] * len(prompts))
            latents = sample(
                self.run.dit,
                noise.to(self.device),
                text,
                config=self.sampler,
                prediction=self.run.config.prediction,  # pyright: ignore[reportArgumentType]
                negative=negative,
                given=None if first_frames is None else self._given(noise.shape, first_frames),
                on_step=on_step,
            )
            return self.codec.decode(latents).float()

    def _encode(self, captions: Sequence[str]) -> TextInput:
        embeds, lens = self.run.text(self.tokenizer(captions))
        return TextInput(embeds.float(), lens)

    def _given(self, shape: torch.Size, first_frames: Tensor) -> Given:
        known = self.codec.encode(first_frames.to(self.device))  # (B, C, 1, H', W')
        latents = torch.zeros(shape, device=self.device)
        latents[:, :, :1] = known
        mask = given_mask("i2v", (shape[2], shape[3], shape[4])).to(self.device)
        return Given(latents, mask.expand(shape[0], *mask.shape), self.run.dit.config.patch_size)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def warn_of_cut(self, prompts: Sequence[str]) -> None:
        """Name on stderr each prompt that fills `text.max_length`: what lies behind is not seen."""
        limit = self.run.config.text.max_length
        for prompt, ids in zip(prompts, self.tokenizer(prompts), strict=True):
            if len(ids) >= limit:
                print(f"cut at text.max_length={limit} tokens: {prompt!r}", file=sys.stderr)


def sampler_of(
    config: DiTRun,
    steps: int | None = None,
    guidance_scale: float | None = None,
    shift: float | None = None,
) -> SamplerConfig:
    """The run's sampler with what the caller sets otherwise."""
    own = config.samples
    return SamplerConfig(
        steps=own.steps if steps is None else steps,
        shift=own.shift if shift is None else shift,
        guidance_scale=own.guidance_scale if guidance_scale is None else guidance_scale,
    )


def noise_for(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of one video, the same on every machine and in every batch."""
    return torch.randn(tuple(shape), generator=generator(seed, "noise"))


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
    sampler = sampler_of(run.config, request.steps, request.guidance_scale, request.shift)
    painter = Painter(run, codec, sampler, precision=run.config.engine.precision)
    painter.warn_of_cut(request.prompts)
    bucket = run.config.data.buckets[0]
    frames = request.frames or bucket.frames
    height, width = request.size or (bucket.height, bucket.width)
    shape = codec.latent_shape(frames, height, width)
    run.dit.config.grid(shape[1:])
    fps = request.fps or run.config.data.fps or DEFAULT_FPS
    first = None
    if request.image is not None:
        check_task(run.config, "i2v")
        first = first_frame(request.image, height, width)
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
                [prompt for prompt, _ in batch],
                noise,
                None if first is None else first.expand(len(batch), *first.shape),
                on_step=partial(_advance, progress, bar, len(batch)),
            )
            for index, ((prompt, n), pixels) in enumerate(zip(batch, video, strict=True), start):
                about = {
                    "prompt": prompt,
                    "seed": request.seed,
                    "video": n,
                    "step": run.place.step,
                    "weights": weights,
                    "steps": sampler.steps,
                    "guidance_scale": sampler.guidance_scale,
                    "shift": sampler.shift,
                }
                stem = out / f"{index:03d}-{slug(prompt)}"
                paths.append(write_clip(stem, to_frames(pixels), fps, request.upscale, about))
    return paths


def _advance(progress: Progress, bar: TaskID, count: int, step: int) -> None:
    progress.advance(bar, count)


def check_task(config: DiTRun, task: str) -> None:
    """ValueError when the run was not trained on the task."""
    if config.tasks.get(task, 0.0) <= 0:
        known = ", ".join(name for name, weight in config.tasks.items() if weight > 0)
        raise ValueError(f"task {task}: the run was trained on {known} only (tasks.{task}=0)")


def first_frame(path: Path, height: int, width: int) -> Tensor:
    """First frame of an image or video file, resized and cropped → (3, 1, H, W) in [-1, 1]."""
    if not path.is_file():
        raise ValueError(f"--image {path}: no such file")
    data = path.read_bytes()
    try:
        info = probe(data)
        size = covering_size(info.height, info.width, height, width)
        frames = decode_clip(data, [0.0], size=size)
    except ValueError as error:
        raise ValueError(f"--image {path}: {error}") from error
    return to_float(crop_clip(frames, height, width, (0.5, 0.5)))


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
