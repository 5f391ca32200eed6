"""What a DiT run draws to look at during training, with the weights now in its module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longtake.data.loader import Batch
from longtake.data.randomness import derive_seed
from longtake.models.sampler import Given, sample
from longtake.models.tokens import Segment
from longtake.train.engine import Engine
from longtake.train.given import masks_of
from longtake.train.painter import noise_for
from longtake.train.playback import to_frames
from longtake.train.tasks import Drawing

if TYPE_CHECKING:
    from longtake.train.dit_task import DiTTask


@torch.no_grad()
def draw_samples(task: DiTTask, engine: Engine, batches: Sequence[Batch]) -> list[Drawing]:
    """Samples for samples.prompts, or for the captions of the first validation clips, which are
    drawn again from their own frames under every task that gives some.

    All prompts of the config start from one noise: two that differ in a word are a minimal pair.
    """
    clips = [clip for batch in batches for clip in batch.clips]
    if not clips:
        return []
    fixed, captions = task.config.samples.prompts, [clip.caption for clip in clips]
    prompts = fixed or captions
    numbers = [0 if fixed else number for number in range(len(prompts))]
    rows = task.captions.of_texts(fixed) if fixed else task.captions.whole(clips)
    fps, shape = clips[0].fps, task.conditions.latent_shape(clips[0].sample)
    video = _draw(task, engine, rows, numbers, shape)
    drawings = _named("sample", video, prompts, fps)
    batch = replace(batches[0], clips=clips)
    for name in task.config.trained_tasks:
        if task.conditions.unfit(name, shape[0]):
            continue
        drawn = task.conditions.fixed(name, shape[0])
        if drawn.frames.runs:
            masks = masks_of([drawn] * len(clips), shape).to(task.device)
            shown = zip(*(task.segments(clip, drawn) for clip in clips), strict=True)
            segments = [Segment(torch.stack([s.latents for s in x]), x[0].start) for x in shown]
            given = Given(task.clean(batch), masks, task.patch_size, segments=segments)
            channels = task.channels(batch, [drawn] * len(clips))
            rows = task.captions.whole(clips)
            video = _draw(task, engine, rows, range(len(clips)), shape, given, channels)
            drawings += _named(name, video, captions, fps)
    return drawings


def _draw(
    task: DiTTask,
    engine: Engine,
    rows: Sequence[Tensor],
    numbers: Sequence[int],
    shape: tuple[int, int, int],
    given: Given | None = None,
    channels: Tensor | None = None,
) -> Tensor:
    """Pixels (B, 3, T, H, W), each from the noise of its number; `channels` None: none is given."""
    settings, encode = task.config.samples, task.module.encode
    seeds = [derive_seed(settings.seed, number) for number in numbers]
    size = (task.codec.channels, *shape)
    if channels is None:
        channels = task.codec.no_channels(shape, len(rows))
    noise = [noise_for(seed, size) for seed in seeds]
    negative = task.captions.of_texts([settings.negative_prompt]) * len(rows)
    with engine.autocast():
        latents = sample(
            task.module.dit,
            torch.stack(noise).to(task.device),
            encode(rows),
            config=settings.sampler,
            prediction=task.prediction,
            negative=encode(negative),
            given=given,
            channels=channels,
        )
    return task.codec.decode(latents)


def _named(name: str, video: Tensor, captions: Sequence[str], fps: float) -> list[Drawing]:
    return [
        Drawing(f"{name}-{number:02d}", to_frames(pixels), fps, caption)
        for number, (pixels, caption) in enumerate(zip(video, captions, strict=True))
    ]
