"""Pieces of a clip that the VAE encodes alone: what is given must not have seen what is asked for.

A piece is named `last` (the last frame, as an image), `suffix:N` (the last N = 1 + st·k frames, as
a clip of their own), `every:K` (frames 0, K, 2K, …, each as an image; K a multiple of st) or
`shown:N+M` (the whole clip, grey but for its first N and last M frames; 0 or 1 + st·k each;
`shown:N` without an end), with st the VAE's stride in time.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Latents (C, P, H, W) of a piece encoded alone, and the P latent frames of the whole clip that
    they stand for."""

    latents: Tensor
    places: tuple[int, ...]

    def at(self, run: range) -> Tensor:
        """(C, p, H, W) of these places."""
        first = self.places.index(run.start)
        return self.latents[:, first : first + len(run)]


@dataclass(frozen=True)
class SegmentSpec:
    """A piece by its name: the last `length` frames, every `length`-th one as a still, or the clip
    of which the first `length` and the last `end` are shown."""

    name: str
    kind: str
    length: int
    end: int = 0

    @classmethod
    def parse(cls, name: str) -> Self:
        """The piece of a name; ValueError for what names none."""
        shown = r"(shown):(0|[1-9]\d*)(?:\+([1-9]\d*))?"
        match = re.fullmatch(rf"(last)|(suffix|every):([1-9]\d*)|{shown}", name)
        if match is None:
            raise ValueError(
                f"segment {name!r} must be last, suffix:N (N frames), every:K (one frame in K) or "
                "shown:N or shown:N+M (the first N and the last M frames, all others grey)"
            )
        kind, length = match[1] or match[2] or match[4], match[3] or match[5] or 1
        return cls(name, kind, int(length), int(match[6] or 0))

    def check(self, num_frames: int, stride: int) -> None:
        """ValueError unless clips of up to `num_frames`, `stride` of them a latent, have the
        piece."""
        is_stills = self.kind == "every"
        for length in filter(None, (self.length, self.end)):
            if (length if is_stills else length - 1) % stride:
                rule = f"a multiple of {stride}" if is_stills else f"1 + {stride}·k"
                raise ValueError(f"segment {self.name}: {length} must be {rule}, for this VAE")
        if not self.fits(num_frames):
            raise ValueError(
                f"segment {self.name}: clips of {num_frames} frames have no such part; "
                f"{self.length + self.end} frames must be less than {num_frames}"
            )

    def fits(self, num_frames: int) -> bool:
        """Whether clips of `num_frames` are long enough to have the piece."""
        return self.length + self.end < num_frames

    def places(self, num_frames: int, stride: int) -> tuple[int, ...]:
        """The latent frames that the piece stands for: those that end with its frames."""
        last = (num_frames - 1) // stride
        if self.kind == "shown":
            return tuple(range(last + 1))
        if self.kind == "every":
            return tuple(range(0, last + 1, self.length // stride))
        return tuple(range(last - (self.length - 1) // stride, last + 1))

    def encode(self, encode: Callable[[Tensor], Tensor], video: Tensor) -> Tensor:
        """The latents (B, Z, P, H', W') of the piece of clips (B, C, T, H, W), encoded alone."""
        if self.kind == "shown":
            frame = torch.arange(video.shape[2], device=video.device)
            is_shown = (frame < self.length) | (frame >= len(frame) - self.end)
            return encode(torch.where(is_shown[:, None, None], video, 0.0))
        if self.kind != "every":
            return encode(video[:, :, -self.length :])
        stills = video[:, :, :: self.length].movedim(2, 1)  # (B, P, C, H, W)
        latents = encode(stills.flatten(0, 1)[:, :, None])  # (B·P, Z, 1, H', W')
        return latents[:, :, 0].unflatten(0, stills.shape[:2]).movedim(1, 2)
