"""Draws batches of videos with one run, from prompts, noise and what is given."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longtake.data.randomness import derive_seed, generator
from longtake.models.conditioning import GivenFrames, given_mask
from longtake.models.flow import add_noise
from longtake.models.sampler import Given, SamplerConfig, TextInput, sample
from longtake.models.text import Tokenizer
from longtake.models.tokens import Segment
from longtake.train.caption_rows import tell, values_of
from longtake.train.codec import Codec
from longtake.train.runs import LoadedDiT
from longtake.train.schema import DiTRun


@dataclass(frozen=True)
class GivenClips:
    """Clips (B, 3, T, H, W) in [-1, 1], or one for all, of which only `frames` are looked at."""

    clips: Tensor
    frames: GivenFrames
    level: float = 0.0  # noise at which they are shown


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
        given: GivenClips | None = None,
        on_step: Callable[[int], None] | None = None,
        *,
        negative: str | None = None,
        numbers: Sequence[Mapping[str, float]] | None = None,
    ) -> Tensor:
        """Pixels (B, 3, T, H, W) in [-1, 1] from noise (B, C, T', H', W') of the latents' shape.

        Frames that are given in place are kept, those encoded alone are drawn with all the others.
        `negative` None stands for the run's own. The `numbers` of each prompt are told behind it
        and behind the negative prompt alike: guidance leads towards the prompt.
        """
        with self._autocast():
            text, empty = self.encode(prompts, numbers), None
            if self.sampler.guidance_scale != 1:
                away = self.run.config.samples.negative_prompt if negative is None else negative
                empty = self.encode([away] * len(prompts), numbers)
            channels = self._channels(noise.shape, given)
            latents = sample(
                self.run.dit,
                noise.to(self.device),
                text,
                config=self.sampler,
                prediction=self.run.config.prediction,  # pyright: ignore[reportArgumentType]
                negative=empty,
                given=None if given is None else self._given(noise.shape, given),
                channels=channels,
                on_step=on_step,
            )
            return self.codec.decode(latents).float()

    def encode(
        self, captions: Sequence[str], numbers: Sequence[Mapping[str, float]] | None
    ) -> TextInput:
        """Captions with what is told of each clip, as words or as tokens of their own."""
        run, rows, told = self.run, self.tokenizer(captions), numbers or [{}] * len(captions)
        if run.numbers is None:
            rows = tell(rows, told, self.tokenizer)
        embeds, lens = run.text(rows)
        text = TextInput(embeds.float(), lens)
        return (
            text if run.numbers is None else run.numbers(text, values_of(run.config.numbers, told))
        )

    def _given(self, shape: torch.Size, given: GivenClips) -> Given:
        clips = given.clips.to(self.device)
        known = self.codec.encode_given(clips, given.frames)
        mask = given_mask(given.frames, (shape[2], shape[3], shape[4])).to(self.device)
        segments = self.codec.encode_segments(clips, given.frames)
        return Given(
            known.expand(shape),
            mask.expand(shape[0], *mask.shape),
            self.run.dit.config.patch_size,
            given.level,
            [self._shown(segment, given.level, shape[0]) for segment in segments],
        )

    def _channels(self, shape: torch.Size, given: GivenClips | None) -> Tensor | None:
        """(B, C', T, H, W) for models that see what is given so."""
        if given is None:
            return self.codec.no_channels((shape[2], shape[3], shape[4]), shape[0])
        clips = given.clips.to(self.device)
        channels = self.codec.encode_channels(clips, [given.frames] * len(clips))
        return None if channels is None else channels.expand(shape[0], -1, -1, -1, -1)

    def _shown(self, segment: Segment, level: float, count: int) -> Segment:
        """A segment at its noise level, whose noise must not be that of the video; (B, …)."""
        latents = segment.latents
        if level:
            noise = noise_for(derive_seed("segment", str(segment.start)), latents.shape[1:])
            latents = add_noise(latents, noise.to(latents), torch.tensor(level))
        return Segment(latents.expand(count, *latents.shape[1:]), segment.start)

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
    solver: str | None = None,
) -> SamplerConfig:
    """The run's sampler with what the caller sets otherwise."""
    wanted = {"steps": steps, "shift": shift, "guidance_scale": guidance_scale, "solver": solver}
    changes: dict[str, Any] = {name: v for name, v in wanted.items() if v is not None}
    return replace(config.samples.sampler, **changes)


def noise_for(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of one video, the same on every machine and in every batch."""
    return torch.randn(tuple(shape), generator=generator(seed, "noise"))
