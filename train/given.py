"""What each sample of a DiT run is given: its task, frames and their noise, from its seed alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product

import numpy as np
import torch
from torch import Tensor

from longtake.data.config import BucketConfig
from longtake.data.latents import LatentManifest
from longtake.data.loader import Clip
from longtake.data.plan.planned import PlannedSample
from longtake.data.randomness import generator, uniform
from longtake.models.conditioning import (
    TASKS,
    GivenFrames,
    draw_task,
    given_frames,
    given_mask,
    num_noisy_tokens,
    unfit,
)
from longtake.models.flow import add_noise
from longtake.models.image_condition import with_mask
from longtake.models.tokens import Segment
from longtake.train.codec import Codec
from longtake.train.schema import DiTRun


@dataclass(frozen=True)
class Drawn:
    """What one sample is given: latent frames, and the noise level they are shown at."""

    task: str
    frames: GivenFrames
    level: float = 0.0


class Conditions:
    """Draws what samples are given; every draw is a function of (config, sample, step)."""

    def __init__(self, config: DiTRun, codec: Codec) -> None:
        """ValueError for a bucket that no task fits, and a task that fits no bucket."""
        self.config, self.codec = config, codec
        self.patch = config.model.patch_size
        # Of all samples of a step alike, and asked for several times of each.
        self.weights_at = lru_cache(maxsize=2)(partial(task_weights, config.task_stages))
        beside = [task for task in config.trained_tasks if not TASKS[task].is_prefix]
        self.has_segments = bool(beside) and codec.vae is not None and not codec.has_channels
        check_lengths(config, codec)

    def draw(self, sample: PlannedSample, step: int) -> Drawn:
        """What the sample is given at a step. Tasks that it is too short for leave their weight to
        the others; every run of frames may be dropped by itself."""
        shape, draw = self.latent_shape(sample), partial(uniform, sample.seed)
        weights = self.weights_at(step).items()
        fitting = {task: w for task, w in weights if not self.unfit(task, shape[0])}
        task, settings = draw_task(draw("task"), fitting), self.config.given
        frames = self.codec.given(task, shape[0], self.patch[0], draw)
        if settings.dropout:
            frames = frames.keep(lambda run: draw(f"given.drop.{run}") >= settings.dropout)
        level = settings.noise * draw("given.noise") if frames.runs else 0.0
        return Drawn(task, frames, level)

    def fixed(self, task: str, num_latents: int) -> Drawn:
        """The same for every sample of a length: for validation."""
        return Drawn(task, self.codec.given(task, num_latents, self.patch[0]))

    def unfit(self, task: str, num_latents: int) -> str:
        """Why clips of so many latent frames cannot serve a task; "" where they can."""
        return unfit(task, num_latents, self.patch[0])

    def latent_shape(self, sample: PlannedSample) -> tuple[int, int, int]:
        """Latent (T, H, W): the plan speaks of pixels, also where latents are cached."""
        _, frames, height, width = self.codec.latent_shape(*sample.shape)
        return frames, height, width

    def segments(self, clip: Clip, drawn: Drawn) -> tuple[Segment, ...]:
        """What the clip is given beside its latents, at the level drawn: (C, t, H, W) each. The
        noise is not that of the video at the same place, which would tell it."""
        stored = []
        for run in drawn.frames.segments:
            name = stored_name(drawn.task, run, self.codec.strides[0])
            latents = clip.segment(name).at(run)
            if drawn.level:
                draws = generator(clip.sample.seed, f"given.noise.{run.start}")
                noise = torch.randn(latents.shape, generator=draws)
                latents = add_noise(latents, noise, torch.tensor(drawn.level))
            stored.append(Segment(latents, run.start))
        return tuple(stored)

    def channels(self, clips: Sequence[Clip], drawn: Sequence[Drawn]) -> Tensor:
        """What the clips, all of a shape, are given as channels (B, st + C, T, H, W), of those that
        `longtake encode` stored."""
        stride = self.codec.strides[0]
        stored = [
            clip.segment(shown_name(*shown_lengths(one.frames, stride))).latents
            for clip, one in zip(clips, drawn, strict=True)
        ]
        mask = self.codec.shown([one.frames for one in drawn], stored[0].shape[1])
        return with_mask(torch.stack(stored), mask, stride)

    def num_tokens(self, sample: PlannedSample) -> int:
        """All tokens of the video itself, given ones included."""
        time, rows, columns = self.config.model.grid(self.latent_shape(sample))
        return time * rows * columns

    def num_all_tokens(self, sample: PlannedSample, step: int) -> int:
        """The same with those of the segments beside it: all that the model works on."""
        video = self.num_tokens(sample)
        if not self.has_segments:
            return video
        beside = sum(map(len, self.draw(sample, step).frames.segments))
        return video + video * beside // self.latent_shape(sample)[0]

    def num_noisy(self, sample: PlannedSample, step: int) -> int:
        """Tokens of the sample that are generated and bear loss."""
        shape = self.latent_shape(sample)
        return _num_noisy(self.draw(sample, step).frames, shape, self.patch)


@lru_cache(maxsize=4096)
def _num_noisy(
    frames: GivenFrames, shape: tuple[int, int, int], patch: tuple[int, int, int]
) -> int:
    return num_noisy_tokens(given_mask(frames, shape), patch)


def masks_of(drawn: Sequence[Drawn], shape: tuple[int, int, int]) -> Tensor:
    """Masks (B, T, H, W) bool on the CPU of what is given in place."""

    return torch.stack([given_mask(one.frames, shape) for one in drawn])


def task_weights(stages: Sequence[tuple[int, Mapping[str, float]]], step: int) -> dict[str, float]:
    """Weights of the tasks at a step, on a straight line between two stages."""
    names = dict.fromkeys(name for _, weights in stages for name in weights)
    return {
        name: at_step([(start, weights.get(name, 0.0)) for start, weights in stages], step)
        for name in names
    }


def at_step(stages: Sequence[tuple[int, float]], step: int) -> float:
    """A value at a step: on a straight line between two stages, then the last one's."""
    return float(np.interp(step, [start for start, _ in stages], [value for _, value in stages]))


def stored_name(task: str, run: range, stride: int) -> str:
    """The piece of clips (see `data.segments`) in which `longtake encode` stores a segment that a
    task gives; `stride` is the VAE's in time."""
    if task == "first_last":
        return "last"
    return f"every:{stride}" if TASKS[task].is_stills else f"suffix:{1 + (len(run) - 1) * stride}"


def shown_lengths(given: GivenFrames, stride: int) -> tuple[int, int]:
    """Pixel frames at the beginning and at the end that are given as channels."""
    lengths = {run.start == 0: 1 + (len(run) - 1) * stride for run in given.channels}
    return lengths.get(True, 0), lengths.get(False, 0)


def shown_name(beginning: int, end: int) -> str:
    """The piece in which `longtake encode` stores what is given as channels."""
    return f"shown:{beginning}+{end}" if end else f"shown:{beginning}"


def needed_segments(config: DiTRun, manifest: LatentManifest) -> list[str]:
    """The pieces that the tasks of a run may take from latents, at any of their draws."""
    patch, stride, names = config.model.patch_size[0], manifest.strides[0], []
    for bucket, task in product(config.data.buckets, config.trained_tasks):
        count = manifest.latent_shape(bucket.shape)[1]
        shown = set()
        for number in range(0 if unfit(task, count, patch) else count):  # reach every length
            given = given_frames(
                *(task, count),
                patch=patch,
                is_causal=True,
                has_channels=config.has_channels,
                draw=lambda purpose, u=number / count: u,
            )
            shown.add(shown_lengths(given, stride))
            names += [stored_name(task, run, stride) for run in given.segments]
        if shown and config.has_channels:  # the two ends are drawn, and dropped, each by itself
            shown |= {(0, 0)} if config.given.dropout else set()
            beginnings, ends = (sorted(set(lengths)) for lengths in zip(*shown, strict=True))
            names += [shown_name(*lengths) for lengths in product(beginnings, ends)]
    return list(dict.fromkeys(names))


def fitting_buckets(config: DiTRun, tasks: Sequence[str], stride: int) -> list[BucketConfig]:
    """Buckets whose clips can serve each of the tasks, the longest first; `stride` is the codec's
    in time. ValueError, with the reasons, where there is none."""
    patch, fitting, reasons = config.model.patch_size[0], [], []
    for bucket in config.data.buckets:
        length = (bucket.frames - 1) // stride + 1
        why = [f"task {task}: {why}" for task in tasks if (why := unfit(task, length, patch))]
        if why:
            reasons.append(f"{why[0]} ({bucket.name})")
        else:
            fitting.append(bucket)
    if not fitting:
        raise ValueError(f"data.buckets: none is fit for {', '.join(tasks)}: {'; '.join(reasons)}")
    return sorted(fitting, key=lambda bucket: -bucket.frames)


def check_lengths(config: DiTRun, codec: Codec) -> None:
    """ValueError where tasks and buckets do not fit together, with the reason."""
    lengths = {bucket.name: codec.latent_shape(*bucket.shape)[1] for bucket in config.data.buckets}
    patch = config.model.patch_size[0]
    for task in config.trained_tasks:
        reasons = {name: unfit(task, length, patch) for name, length in lengths.items()}
        if all(reasons.values()):
            name, reason = next(iter(reasons.items()))
            raise ValueError(
                f"tasks.{task} fits no bucket: {reason} ({name}); set tasks.{task}=0 or use other "
                "clips"
            )
    for step, weights in config.task_stages:
        names = [name for name, weight in weights.items() if weight > 0]
        for bucket, length in lengths.items():
            if all(unfit(task, length, patch) for task in names):
                raise ValueError(
                    f"data.buckets has {bucket}, which none of the tasks {', '.join(names)} of "
                    f"step {step} can use: add t2v, or t2i for images"
                )
