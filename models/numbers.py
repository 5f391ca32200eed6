"""Numbers of a clip (frames per second, motion, quality) as tokens of their own behind the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longtake.models.layers import MLP, timestep_embedding
from longtake.models.sampler import TextInput
from longtake.models.transfer import to_device

NUM_WAVES = 64
WIDTH = 256  # of the layer between the waves and the text's own width


@dataclass(frozen=True)
class Told:
    """A row of text, and the values (n,) told with it on the CPU; NaN is not told."""

    row: Tensor
    values: Tensor

    def __len__(self) -> int:
        return len(self.row)


class NumberTokens(nn.Module):
    """A token for each number, added to the row behind the text, which is padding: zero.

    So a number that is not told leaves the text as it is, and so does a fresh module, whose tokens
    are zero. A text that fills the whole length shares its last rows with the numbers.
    """

    def __init__(self, sources: Mapping[str, str], text_dim: int) -> None:
        """sources: word → what its number measures, such as {motion: motion_score}."""
        super().__init__()
        self.sources = dict(sorted(sources.items()))  # the order of the values
        tokens = [MLP(NUM_WAVES, WIDTH, text_dim, "silu") for _ in self.sources]
        self.tokens = nn.ModuleList(tokens)
        for token in tokens:
            nn.init.zeros_(token.fc2.weight)
            nn.init.zeros_(token.fc2.bias)

    def forward(self, text: TextInput, values: Tensor) -> TextInput:
        """Text (B, L, D) with numbers (B, n) of about 0.01 to 10⁴: they are seen in waves with
        periods from 0.06 to 470, so scale what lies or differs outside of that range."""
        assert text.lens is not None
        (length, device), count = (text.embeds.shape[1], text.embeds.device), len(self.tokens)
        waves = timestep_embedding(to_device(values.nan_to_num(), device) / 10, NUM_WAVES)
        waves = waves.to(next(self.parameters()).dtype)
        tokens = [token(waves[:, i]) for i, token in enumerate(self.tokens)]  # all, on every rank
        lens = (text.lens + count).clamp(max=length)
        places = lens[:, None] - count + torch.arange(count)
        is_here = torch.arange(length)[:, None] == places[:, None]  # (B, L, n)
        shares = (is_here & ~values.isnan()[:, None]).float()
        added = to_device(shares, device) @ torch.stack(tokens, 1).float()  # (B, L, D)
        return TextInput(text.embeds + added, lens)
