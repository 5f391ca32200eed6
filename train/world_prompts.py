"""World prompts: which clips are asked for, how they are drawn, what the drawing is worth.

The command `evaluate` and the evaluation inside training use the same functions. Every prompt, its
true clip and its noise follow from (seed, split, index) alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.data.randomness import derive_seed
from longtake.data.world import FAMILIES, Shapes, WorldClip, make_clip, make_pair, score_frames
from longtake.data.world.clips import check_request
from longtake.data.world.given import (
    appearance,
    appearance_at_end,
    held_frames,
    position_error,
    score_given,
)
from longtake.data.world.language import ASKING
from longtake.models.conditioning import TASKS, GivenFrames, unfit
from longtake.train.caption_rows import known_numbers
from longtake.train.card import CONTINUATION, DRIFT, PAIR_FLIP, ClipScores
from longtake.train.codec import Codec
from longtake.train.frame_rate import DEFAULT_FPS
from longtake.train.given import fitting_buckets
from longtake.train.painter import GivenClips, Painter, noise_for
from longtake.train.playback import to_frames, to_pixels
from longtake.train.schema import DiTRun


@dataclass(frozen=True)
class PromptSet:
    """What to ask for: `num_prompts` per family and split, of clips of one shape (T, H, W).

    `num_pairs` of them, in the split `val`, get a twin: a prompt that differs in one word, drawn
    from the same noise. `drift` k > 1 asks again for val clips of 2 … k times the length.
    """

    families: tuple[str, ...]
    splits: tuple[str, ...]
    num_prompts: int
    shape: tuple[int, int, int]
    fps: float
    kind: str = "short"
    num_pairs: int = 0
    drift: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        shapes = Shapes((self.shape[1:],), self.shape[:1], (self.fps,))
        for split in self.splits:
            check_request(self.families, split, shapes)
        if self.kind not in ASKING:
            raise ValueError(
                f"captions {self.kind}: prompts that ask for something are {', '.join(ASKING)}"
            )
        for name, values in (("families", self.families), ("splits", self.splits)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={','.join(values)} names something twice")
        if self.num_prompts < 1 or self.drift < 1 or self.num_pairs < 0:
            raise ValueError(
                f"prompts={self.num_prompts} and drift={self.drift} must be at least 1, "
                f"pairs={self.num_pairs} at least 0"
            )

    def jobs(self, task: str) -> list[tuple[str, int, int, str]]:
        """Split, index, trained lengths and family of every prompt of a task, in a fixed order.

        Splits and families take turns, so that any head of the list is fair to all.
        """
        longer = range(2, self.drift + 1 if task == "t2v" else 2)
        every = range(self.num_prompts), self.families
        jobs = [(split, i, 1, name) for i in every[0] for split in self.splits for name in every[1]]
        return jobs + [("val", i, k, name) for k in longer for i in every[0] for name in every[1]]

    @property
    def round(self) -> int:
        """Prompts of one round: one of every family in every split."""
        return len(self.families) * len(self.splits)


@dataclass(frozen=True)
class Prompt:
    """One video to be drawn, with the clip that is its truth.

    A `twin` is drawn from the same noise. `factor` counts the trained lengths of the video; where
    drift is asked for, `window` is the frames of one.
    """

    clip: WorldClip
    twin: WorldClip | None = None
    factor: int = 1
    window: int = 0

    @property
    def clips(self) -> tuple[WorldClip, ...]:
        return (self.clip,) if self.twin is None else (self.clip, self.twin)


@dataclass(frozen=True)
class Reference:
    """What the true clip and its copy through the codec score on the same prompt."""

    truth: dict[str, float]
    ceiling: dict[str, float]


def fits(family: str, shape: tuple[int, int, int]) -> bool:
    """Whether clips of the family can have this (T, H, W); ValueError for an unknown family."""
    if family not in FAMILIES:
        raise ValueError(f"family {family} is unknown: use {', '.join(sorted(FAMILIES))}")
    return Shapes((shape[1:],), shape[:1]).fits(family)


def shapes_for(
    config: DiTRun,
    task: str,
    stride: int,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
) -> list[tuple[int, int, int]]:
    """(T, H, W) of the buckets that fit a task, the longest first, with `frames` and `size` in
    place of their own; an image stays one. `stride` is the codec's in time.

    ValueError where no bucket, or not so many frames, can serve the task.
    """
    if TASKS[task].is_image:
        frames = None
    patch = config.model.patch_size[0]
    if frames is not None and (reason := unfit(task, (frames - 1) // stride + 1, patch)):
        raise ValueError(f"frames={frames}: task {task}: {reason}")
    buckets = fitting_buckets(config, [task], stride)
    return [(frames or one.frames, *(size or (one.height, one.width))) for one in buckets]


def most_used_captions(config: DiTRun) -> str:
    """The kind of asking captions that the run saw most; short ones where it saw only others."""
    shares = config.data.train[0].captions
    return max(ASKING, key=lambda kind: (shares.get(kind, 0.0), kind == "short"))


def prompts_for(
    config: DiTRun,
    task: str,
    families: Sequence[str],
    kind: str | None,
    shapes: Sequence[tuple[int, int, int]],
    rates: tuple[float, float],
    **settings: Any,
) -> PromptSet:
    """What to ask of a run under a task: clips of the first of the `shapes` that most families fit
    in, at the rate of its training (`rates` are `drawn_rates`); of an image task only families that
    stand still.

    ValueError for what world or shapes do not hold.
    """
    shape = max(shapes, key=lambda one: sum(fits(name, one) for name in families))
    if TASKS[task].is_image:
        still = [name for name in families if fits(name, shape)]
        if not still:
            raise ValueError(
                f"task {task}: none of the families {', '.join(families)} can be an image; name "
                "one that can, or other tasks"
            )
        families, settings = still, settings | {"num_pairs": 0, "drift": 1}
    fps = rates[shape[0] == 1] or DEFAULT_FPS
    kind = kind or most_used_captions(config)
    return PromptSet(families=tuple(families), kind=kind, shape=shape, fps=fps, **settings)


def prompts(
    wanted: PromptSet, task: str, temporal_stride: int, rank: int = 0, num_ranks: int = 1
) -> Iterator[Prompt]:
    """A rank's share of the prompts of a task: every `num_ranks`-th of `wanted.jobs`."""
    frames, height, width = wanted.shape
    options: dict[str, Any] = {"height": height, "width": width, "fps": wanted.fps}
    for split, index, factor, family in wanted.jobs(task)[rank::num_ranks]:
        place = wanted.seed, split, index
        options["families"] = [family]
        if factor > 1:
            longer = (frames - 1) * factor + 1 if temporal_stride > 1 else frames * factor
            clip = make_clip(*place, frames=longer, **options)
            yield Prompt(clip, factor=factor, window=frames)
        else:
            is_val = task == "t2v" and split == "val"
            window = frames if is_val and wanted.drift > 1 else 0
            if is_val and index < wanted.num_pairs:
                clip, twin = make_pair(*place, frames=frames, **options)
            else:
                clip, twin = make_clip(*place, frames=frames, **options), None
            yield Prompt(clip, twin, window=window)


def batches(items: Iterable[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Prompts in order, up to `size` videos of one shape together."""
    batch: list[Prompt] = []
    for item in items:
        count = sum(len(one.clips) for one in batch)
        is_other = batch and batch[0].clip.frames.shape != item.clip.frames.shape
        if batch and (is_other or count + len(item.clips) > size):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def draw(
    painter: Painter, batch: Sequence[Prompt], task: str, kind: str, seed: int
) -> list[list[np.ndarray]]:
    """Per prompt one video per clip, uint8 (T, H, W, 3); noise from (seed, key) alone."""
    codec = painter.codec
    clips = [clip for item in batch for clip in item.clips]
    height, width = clips[0].frames.shape[1:3]
    shape = codec.latent_shape(len(clips[0].frames), height, width)
    painter.run.dit.config.grid(shape[1:])
    noise = [
        noise_for(derive_seed(seed, f"{item.clip.family}/{item.clip.key}"), shape)
        for item in batch
        for _ in item.clips
    ]
    frames = given_of(painter, task, len(clips[0].frames))
    given = GivenClips(stack(clips), frames) if frames.runs else None
    config = painter.run.config
    fps = clips[0].fps if len(clips[0].frames) > 1 else config.data.fps or 0.0
    video = painter.draw(
        *([clip.captions[kind] for clip in clips], torch.stack(noise), given),
        numbers=[known_numbers(config, fps)] * len(clips),
    )
    drawn = iter(to_frames(pixels) for pixels in video)
    return [[next(drawn) for _ in item.clips] for item in batch]


def given_of(painter: Painter, task: str, num_frames: int) -> GivenFrames:
    """What a task gives of clips of so many frames; ValueError for clips it does not fit."""
    patch = painter.run.dit.config.patch_size[0]
    return painter.codec.given(task, painter.codec.latent_frames(num_frames), patch)


def rebuild(codec: Codec, item: Prompt) -> list[np.ndarray]:
    """The true clips through the codec and back: the best that any sampler can draw."""
    video = codec.decode(codec.encode(stack(item.clips).to(codec.mean.device)))
    return [to_frames(pixels) for pixels in video]


def stack(clips: Sequence[WorldClip]) -> Tensor:
    """True clips as (B, 3, T, H, W) in [-1, 1]."""
    return torch.stack([to_pixels(clip.frames) for clip in clips])


def score(
    item: Prompt, videos: Sequence[np.ndarray], kind: str, given: Sequence[int]
) -> dict[str, float]:
    """Scores of the videos of a prompt: those its caption asks for, those of what was given,
    `pair_flip` where there is a twin; of a longer video only whether it drifts."""
    clip = item.clip
    expect = clip.reading(kind).expect
    drift = {}
    if item.window and (asked := appearance(clip.family, expect)):
        drift[f"{DRIFT}{item.factor}x"] = appearance_at_end(videos[0], asked, item.window)
    if item.factor > 1:
        return drift
    first = score_frames(videos[0], expect)
    scores = first | score_given(videos[0], clip.frames, given) | drift
    if item.twin is not None:
        one, other = clip.reading(kind), item.twin.reading(kind)
        (slot,) = (slot for slot, word in one.words.items() if other.words[slot] != word)
        scores[PAIR_FLIP] = pair_flip(
            first, score_frames(videos[1], other.expect), one.slots(), slot
        )
    return scores


def pair_flip(
    first: Mapping[str, float],
    second: Mapping[str, float],
    asks: Mapping[str, Collection[str]],
    slot: str,
) -> float:
    """1 when what the changed word asks is right in both videos of a pair, and what other words ask
    is as it was: right or wrong, it must agree.

    `asks` are the slots that each score asks about, `slot` is that of the changed word: the scores
    that ask about it and least else measure it. A score that asks about no word, such as that
    things keep their looks, has a row of its own and says nothing of a flip.
    """
    narrowest = min(len(asks[name]) for name in first if slot in asks[name])
    measures = {n for n in first if slot in asks[n] and len(asks[n]) == narrowest}
    others = {name for name in first.keys() - measures if asks[name]}
    is_right = all(first[name] == second.get(name) == 1.0 for name in measures)
    return float(is_right and all(first[name] == second.get(name) for name in others))


def levels(
    item: Prompt, scores: Mapping[str, float], kind: str, given: Sequence[int]
) -> dict[str, tuple[float, ...]]:
    """Chance and blind level of these scores.

    Where frames are given, chance is what they are worth when they stand still: of what a frame
    shows, no prompt needs to tell. Given frames are not kept by chance, and no pair flips
    for a model that reads no word.
    """
    clip = item.clip
    known = clip.reading(kind).levels(clip.description.canvas)
    if of := list(appearance(clip.family, known).values()):
        known[f"{DRIFT}{item.factor}x"] = tuple(np.mean(of, axis=0).tolist())
    if given:
        still = clip.frames[held_frames(given, len(clip.frames))]
        held = score(replace(item, twin=None), [still], kind, given)
        known = {
            name: (value, max(value, known.get(name, (0, 0))[1])) for name, value in held.items()
        }
        known["given_kept"] = (0.0, 0.0)
    return {name: known.get(name, (0.0, 0.0)) for name in scores}


@dataclass(frozen=True)
class Scored:
    """A prompt with its first video, uint8 (T, H, W, 3), and the row of its scores."""

    prompt: Prompt
    video: np.ndarray
    row: ClipScores


class Scorer:
    """Draws and scores prompts of one run; what true clips score is worked out once and kept."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.seed = kind, seed
        self.num_cut = 0  # prompts longer than the text encoder reads
        self._references: dict[tuple[str, str, str, int], Reference] = {}

    def batch(
        self, painter: Painter, items: Sequence[Prompt], task: str, weights: str
    ) -> list[Scored]:
        """One batch of prompts of one shape."""
        codec = painter.codec
        frames = given_of(painter, task, len(items[0].clip.frames))
        given = codec.pixel_frames(frames)
        drawn = draw(painter, items, task, self.kind, self.seed)
        limit = painter.run.config.text.max_length
        ids = painter.tokenizer([item.clip.captions[self.kind] for item in items])
        self.num_cut += sum(len(row) >= limit for row in ids)
        return [
            self._row(codec, item, videos, given, task, weights)
            for item, videos in zip(items, drawn, strict=True)
        ]

    def _row(
        self,
        codec: Codec,
        item: Prompt,
        videos: Sequence[np.ndarray],
        given: Sequence[int],
        task: str,
        weights: str,
    ) -> Scored:
        clip = item.clip
        key = task, clip.family, clip.key, item.factor
        if key not in self._references:
            copies = rebuild(codec, item)
            truth = score(item, [one.frames for one in item.clips], self.kind, given)
            self._references[key] = Reference(truth, score(item, copies, self.kind, given))
        drawn = score(item, videos, self.kind, given)
        known = levels(item, drawn, self.kind, given)
        row = ClipScores(
            weights=weights,
            task=task,
            split=clip.split,
            family=clip.family,
            key=clip.key if item.factor == 1 else f"{clip.key}@{item.factor}x",
            prompt=clip.captions[self.kind],
            drawn=drawn,
            ceiling=self._references[key].ceiling,
            truth=self._references[key].truth,
            chance={name: known[name][0] for name in drawn},
            blind={name: known[name][1] for name in drawn},
            position_error=position_error(videos[0], clip.frames, given)
            if CONTINUATION in drawn
            else None,
        )
        return Scored(item, videos[0], row)
