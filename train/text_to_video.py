"""What a DiT run trains: the transformer and, where they learn too, text encoder and numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longtake.models.dit import DiT
from longtake.models.numbers import NumberTokens, Told
from longtake.models.sampler import TextInput
from longtake.models.text import TextEncoder
from longtake.models.tokens import Video
from longtake.models.transfer import to_device
from longtake.train.optim import freeze
from longtake.train.schema import DiTRun


class TextToVideo(nn.Module):
    """DiT and, when it is trained along, the text encoder: one module for the engine.

    Text comes as a row per sample: token ids (L,) where the encoder is here, embeddings (L, D) of
    a frozen one where it is not; with `numbers` as `Told`.
    """

    def __init__(
        self,
        dit: DiT,
        text: TextEncoder | None,
        max_length: int,
        numbers: NumberTokens | None = None,
    ) -> None:
        super().__init__()
        self.dit = dit
        self.text = text
        self.max_length = max_length
        self.numbers = numbers

    @classmethod
    def from_config(cls, config: DiTRun) -> TextToVideo:
        """Fresh weights, what config.freeze names not to be trained; errors as of `freeze`."""
        text = TextEncoder(config.text) if config.text.is_trained else None
        dit, sources = DiT(config.model), config.numbers.embedded
        numbers = NumberTokens(sources, config.model.text_dim) if sources else None
        module = cls(dit, text, config.text.max_length, numbers)
        freeze(module, config.freeze)
        return module

    def encode(self, rows: Sequence[Tensor | Told]) -> TextInput:
        """Embeddings (B, max_length, D), zero after each row's end, and their lengths."""
        values = [row.values for row in rows if isinstance(row, Told)]
        texts = [row.row if isinstance(row, Told) else row for row in rows]
        if self.text is not None:
            text = TextInput(*self.text(texts))
        else:
            text = pad_embeddings([row.cpu() for row in texts], self.max_length)
            device = next(self.dit.parameters()).device
            text = TextInput(to_device(text.embeds, device), text.lens)
        return text if self.numbers is None else self.numbers(text, torch.stack(values))

    def forward(
        self,
        latents: Tensor | Sequence[Video],
        t: Tensor,
        rows: Sequence[Tensor | Told],
        levels: Tensor | None = None,
        level_index: Tensor | None = None,
        extra_t: Tensor | None = None,
        budget: int | None = None,
    ) -> Tensor | list[Tensor]:
        """latents (B, C, T, H, W), t (B,) -> prediction (B, C, T, H, W); levels as for the DiT.

        Or a pack, B videos of any sizes with what is given beside them, at `extra_t` (B,) -> as
        many predictions (C, T, H, W); `budget` pads it, see the DiT.
        """
        text = self.encode(rows)
        return self.dit(
            *(latents, t, to_device(text.embeds, t.device), text.lens),
            levels=levels,
            level_index=level_index,
            extra_t=extra_t,
            budget=budget,
        )


def pad_embeddings(rows: Sequence[Tensor], length: int) -> TextInput:
    """Rows (L, D) -> embeddings (B, length, D), zero after each row's end, and lengths (B,)."""
    lens = torch.tensor([len(row) for row in rows])
    longest = int(lens.max())
    if longest > length:
        raise ValueError(f"text of {longest} tokens: text.max_length={length} is the limit")
    embeds = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return TextInput(nn.functional.pad(embeds, (0, 0, 0, length - longest)).float(), lens)
