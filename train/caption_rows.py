"""Captions as the module takes them: a row of token ids, or embeddings of a frozen encoder.

Numbers that are known of a clip (frames per second, scores) may stand behind its caption, as words
or as tokens of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import nan

import torch
from torch import Tensor

from longtake.data.catalogue import open_manifest, read_parts
from longtake.data.latents import read_empty_text
from longtake.data.loader import Clip
from longtake.data.randomness import uniform
from longtake.models.numbers import Told
from longtake.models.text import TextEncoder, Tokenizer
from longtake.train.checks import require
from longtake.train.schema import DiTRun, NumbersConfig

FPS = "fps"  # the source of a number that every clip has


class CaptionRows:
    """Rows of clips: ids (L,) where the encoder is trained along, else embeddings (L, D); `Told`
    where numbers are tokens of their own."""

    def __init__(self, config: DiTRun, device: torch.device) -> None:
        self.config, self.device = config, device
        self.tokenizer = Tokenizer(config.text)
        self._encoder: TextEncoder | None = None
        self._is_cached = config.codec == "vae" and not config.text.is_trained
        self._empty = (
            read_empty_text(config.data.train[0].path)
            if self._is_cached
            else self.tokenizer([""])[0]
        )

    @property
    def frozen(self) -> TextEncoder:
        """The pretrained encoder, loaded when it is first needed: cached text needs none."""
        if self._encoder is None:
            self._encoder = TextEncoder(self.config.text).to(self.device)
        return self._encoder

    def whole(self, clips: Sequence[Clip]) -> list[Tensor] | list[Told]:
        """Captions and all that is known of the clips, as validation tells them."""
        told = [self.known(clip) for clip in clips]
        rows, _ = self._told(clips, told)
        return self._finish(rows, told)

    def training(self, clips: Sequence[Clip]) -> tuple[list[Tensor] | list[Told], list[bool]]:
        """The same with captions and numbers dropped, each by itself, a caption for that of the
        empty prompt; and whether each caption, dropped or not, is cut at `text.max_length`.
        ValueError for such a caption with text.too_long=refuse."""
        config, draws = self.config, [partial(uniform, clip.sample.seed) for clip in clips]
        told = [
            {w: x for w, x in self.known(c).items() if draw(f"drop_{w}") >= config.numbers.dropout}
            for c, draw in zip(clips, draws, strict=True)
        ]
        rows, are_cut = self._told(clips, told)
        for index, draw in enumerate(draws):
            if draw("drop_text") < config.caption_dropout:
                (rows[index],) = self._as_words([self._empty], [told[index]])
        return self._finish(rows, told), are_cut

    def of_texts(
        self, captions: Sequence[str], numbers: Sequence[Mapping[str, float]]
    ) -> list[Tensor] | list[Told]:
        """Rows of any captions with what is told behind each; "" is cached where the others
        were."""
        if self._is_cached and not any(captions):
            return self._as_tokens([self._empty] * len(captions), numbers)
        rows = self._encode(self._as_words(self.tokenizer(captions), numbers))
        return self._as_tokens(rows, numbers)

    def known(self, clip: Clip) -> dict[str, float]:
        """What is known of a clip, of all that is told."""
        return known_numbers(self.config, clip.fps, clip.scores)

    def _captions(self, clips: Sequence[Clip]) -> list[Tensor]:
        """From the cache where it holds them, else token ids made here."""
        return [
            self.tokenizer([clip.caption])[0] if clip.text is None else clip.text for clip in clips
        ]

    def _told(
        self, clips: Sequence[Clip], told: Sequence[Mapping[str, float]]
    ) -> tuple[list[Tensor], list[bool]]:
        """Rows of the captions with what is told behind each, and whether each is cut."""
        rows = self._as_words(self._captions(clips), told)
        return rows, [self._is_cut(*each) for each in zip(rows, clips, told, strict=True)]

    def _is_cut(self, row: Tensor, clip: Clip, numbers: Mapping[str, float]) -> bool:
        """Whether the caption lost something to the limit or to the numbers behind it in the row.

        ValueError where it did, with text.too_long=refuse.
        """
        limit = self.config.text.max_length
        if len(row) < limit:
            return False
        length = self.tokenizer.num_tokens(clip.caption)  # it fits to the token, or is cut
        if numbers and not self.config.numbers.embedded:
            length += self.tokenizer.num_tokens(_suffix(numbers)) - 1  # one end mark
        if length > limit and self.config.text.too_long == "refuse":
            raise ValueError(
                f"{clip.sample.key}: its {clip.sample.caption_kind} caption has {length} tokens, "
                f"text.max_length={limit} cuts it ({clip.caption[:60]!r}…); with "
                "text.too_long=refuse it must be shorter: filter it out, raise the limit, or set "
                "text.too_long=truncate"
            )
        return length > limit

    def _finish(
        self, rows: list[Tensor], told: Sequence[Mapping[str, float]]
    ) -> list[Tensor] | list[Told]:
        return self._as_tokens(rows if self._is_cached else self._encode(rows), told)

    def _as_words(self, rows: list[Tensor], told: Sequence[Mapping[str, float]]) -> list[Tensor]:
        return rows if self.config.numbers.embedded else tell(rows, told, self.tokenizer)

    def _as_tokens(
        self, rows: list[Tensor], told: Sequence[Mapping[str, float]]
    ) -> list[Tensor] | list[Told]:
        if not self.config.numbers.embedded:
            return rows
        values = values_of(self.config.numbers, told)
        return [Told(*each) for each in zip(rows, values, strict=True)]

    def _encode(self, ids: list[Tensor]) -> list[Tensor]:
        return ids if self.config.text.is_trained else self.frozen.rows(ids)


def known_numbers(
    config: DiTRun, fps: float, scores: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Words and numbers that are told of a clip of this rate and these scores."""
    values = {**(scores or {}), FPS: fps}
    told = config.numbers.told.items()
    return {word: values[source] for word, source in told if source in values}


def check_scores(config: DiTRun) -> None:
    """ValueError for a score that is to be told and that no training sample has."""
    wanted = {word: source for word, source in config.numbers.told.items() if source != FPS}
    known: set[str] = set()
    for dataset in config.data.train if wanted else ():
        manifest = open_manifest(dataset.path, dataset.catalogue, config.data.cache)
        scores = read_parts(manifest, list(manifest.shards), ["scores"])["scores"]
        known.update(*(chunk.keys.unique().to_pylist() for chunk in scores.chunks))
    for word, source in wanted.items():
        require(
            source in known,
            f"numbers.sources.{word}={source}: no sample of data.train has such a score (they have "
            f"{', '.join(sorted(known)) or 'none'}); name one of theirs, fps, or null",
        )


def values_of(config: NumbersConfig, told: Sequence[Mapping[str, float]]) -> Tensor:
    """Values (B, n) as `NumberTokens` takes them."""
    return torch.tensor([[one.get(word, nan) for word in config.embedded] for one in told])


def tell(
    rows: Sequence[Tensor], numbers: Sequence[Mapping[str, float]], tokenizer: Tokenizer
) -> list[Tensor]:
    """Token ids of captions, each with its numbers behind it, if any."""
    return [
        join_words(row, told, tokenizer) if told else row
        for row, told in zip(rows, numbers, strict=True)
    ]


def join_words(row: Tensor, numbers: Mapping[str, float], tokenizer: Tokenizer) -> Tensor:
    """Token ids (L,) of a caption with its numbers behind it, which a long caption makes room for:
    "… moves left.(fps 8, motion 0.3)"."""
    (suffix,) = tokenizer([_suffix(numbers)])
    room = max(tokenizer.config.max_length - len(suffix), 0)
    return torch.cat((row[:-1][:room], suffix))


def _suffix(numbers: Mapping[str, float]) -> str:
    words = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
    return f"({words})"
