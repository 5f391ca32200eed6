"""What a DiT run draws to look at during training, with the weights now in its module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longtake.data.config import DataConfig
from longtake.data.loader import Batch, Clip
from longtake.data.plan.costs import micro_batch_size, resolve_buckets
from longtake.data.randomness import derive_seed
from longtake.models.numbers import Told
from longtake.models.sampler import Given, sample
from longtake.models.tokens import Segment
from longtake.train.caption_rows import known_numbers
from longtake.train.engine import Engine
from longtake.train.frame_rate import drawn_rate
from longtake.train.given import Drawn, fitting_buckets, masks_of
from longtake.train.painter import noise_for
from longtake.train.playback import to_frames
from longtake.train.tasks import Drawing

if TYPE_CHECKING:
    from longtake.train.dit_task import DiTTask


@torch.no_grad()
def draw_samples(task: DiTTask, engine: Engine, batches: Sequence[Batch]) -> list[Drawing]:
    """Samples for samples.prompts, or for the captions of the first validation clips, which are
    drawn again from their own frames under every task that gives some. Where these are videos and
    t2i is trained, images of the same texts besides. Without clips, prompts are drawn by the
    longest bucket.

    All prompts of the config start from one noise: two that differ in a word are a minimal pair.
    No more are drawn at once than a micro-batch of their shape holds.
    """
    config, clips = task.config, [clip for batch in batches for clip in batch.clips]
    if not clips and not config.samples.prompts:
        return []
    if clips:
        size, fps = clips[0].sample.shape, clips[0].fps
    else:
        size = max(config.data.buckets, key=lambda bucket: bucket.frames).shape
        fps = drawn_rate(config, size[0])
    drawings = _draw_texts(task, engine, clips, "sample", size, fps)
    if size[0] > 1 and "t2i" in config.trained_tasks:
        images = fitting_buckets(config, ["t2i"], task.codec.strides[0])
        largest = max(images, key=lambda image: image.height * image.width).shape
        rate = drawn_rate(config, 1)
        still = [replace(clip, fps=rate, scores={}) for clip in clips]  # scores are of the video
        drawings += _draw_texts(task, engine, still, "t2i", largest, rate)
    if not clips:
        return drawings
    length = task.conditions.latent_shape(clips[0].sample)[0]
    for name in config.trained_tasks:
        if task.conditions.unfit(name, length):
            continue
        drawn = task.conditions.fixed(name, length)
        if drawn.frames.runs:
            most = _micro_batch_size(config.data, size)
            parts = [slice(start, start + most) for start in range(0, len(clips), most)]
            videos = [
                _draw_given(task, engine, replace(batches[0], clips=clips[part]), part.start, drawn)
                for part in parts
            ]
            drawings += _named(name, torch.cat(videos), [clip.caption for clip in clips], fps)
    return drawings


def _draw_texts(
    task: DiTTask,
    engine: Engine,
    clips: Sequence[Clip],
    name: str,
    size: tuple[int, int, int],
    fps: float,
) -> list[Drawing]:
    """samples.prompts, or the captions of the clips, drawn at this bucket's (T, H, W)."""
    fixed, captions = task.config.samples.prompts, task.captions
    if fixed:
        told = [known_numbers(task.config, fps)] * len(fixed)
        rows = captions.of_texts(fixed, told)
    else:
        told, rows = [captions.known(clip) for clip in clips], captions.whole(clips)
    noises = [0 if fixed else number for number in range(len(rows))]
    shape, most = task.codec.latent_shape(*size)[1:], _micro_batch_size(task.config.data, size)
    parts = [slice(start, start + most) for start in range(0, len(rows), most)]
    videos = [_draw(task, engine, rows[p], told[p], noises[p], shape) for p in parts]
    return _named(name, torch.cat(videos), fixed or [clip.caption for clip in clips], fps)


def _micro_batch_size(data: DataConfig, shape: tuple[int, int, int]) -> int:
    data = resolve_buckets(data)
    buckets = [bucket for bucket in data.buckets if bucket.shape == shape]
    return micro_batch_size(buckets[0], data)


def _draw_given(task: DiTTask, engine: Engine, batch: Batch, first: int, drawn: Drawn) -> Tensor:
    """Pixels (B, 3, T, H, W) of clips drawn again from what each is given, the first from the noise
    of number `first`."""
    clips, shape = batch.clips, task.conditions.latent_shape(batch.samples[0])
    masks = masks_of([drawn] * len(clips), shape).to(task.device)
    shown = zip(*(task.segments(clip, drawn) for clip in clips), strict=True)
    segments = [Segment(torch.stack([s.latents for s in x]), x[0].start) for x in shown]
    given = Given(task.clean(batch), masks, task.patch_size, segments=segments)
    channels = task.channels(batch, [drawn] * len(clips))
    rows, told = task.captions.whole(clips), [task.captions.known(clip) for clip in clips]
    noises = range(first, first + len(clips))
    return _draw(task, engine, rows, told, noises, shape, given, channels)


def _draw(
    task: DiTTask,
    engine: Engine,
    rows: Sequence[Tensor | Told],
    told: Sequence[Mapping[str, float]],
    noises: Sequence[int],
    shape: tuple[int, int, int],
    given: Given | None = None,
    channels: Tensor | None = None,
) -> Tensor:
    """Pixels (B, 3, T, H, W), each from the noise of its number; what is `told` in its row is told
    behind the negative prompt, too. `channels` None: none is given."""
    settings, encode = task.config.samples, task.module.encode
    seeds = [derive_seed(settings.seed, number) for number in noises]
    size = (task.codec.channels, *shape)
    if channels is None:
        channels = task.codec.no_channels(shape, len(rows))
    noise = [noise_for(seed, size) for seed in seeds]
    negative = task.captions.of_texts([settings.negative_prompt] * len(rows), told)
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
