"""Sequence parallelism: the ranks of a group share the tokens of a batch, or of a pack.

Each rank holds a run of tokens, as many as the others: the last ones are padded. What acts on one
token at a time needs nothing else. For self-attention the ranks trade, as in DeepSpeed-Ulysses
(arXiv 2309.14509): one all-to-all gives each rank all tokens of its share of the heads, another one
brings all heads of its tokens back. In between, the padding stands behind all tokens and is cut
off: no kernel needs a mask, and the samples of a pack lie whole on every rank.

All ranks end with the whole prediction, but each sends back the gradient of its own tokens only:
what a rank finds for a parameter is its part of a sum over the group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from longtake.models.attention import Documents, attention
from longtake.models.tokens import TokenSequence


@dataclass(frozen=True)
class SharedTokens:
    """How `num_tokens` lie on the ranks of a group: n on each, N = num_tokens ≤ n · ranks."""

    group: dist.ProcessGroup
    num_tokens: int

    @property
    def length(self) -> int:
        """Tokens of each rank, padding included."""
        return -(-self.num_tokens // self.group.size())

    def share(self, sequence: TokenSequence) -> TokenSequence:
        """What this rank holds of the tokens; grids and lengths stay those of them all."""
        return replace(
            sequence,
            patches=self._share(sequence.patches, 1),
            rope=self._share(sequence.rope, 0),
            rows=None if sequence.rows is None else self._share(sequence.rows, 1),
        )

    @property
    def _own(self) -> range:
        """This rank's tokens, without padding."""
        first, last = (self.length * (self.group.rank() + i) for i in (0, 1))
        return range(min(first, self.num_tokens), min(last, self.num_tokens))

    def lengths(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """How many of this rank's tokens each sample of a pack has; the last one has the padding
        of the share."""
        own = self._own
        ends = [min(max(end, own.start), own.stop) for end in accumulate(lengths, initial=0)]
        *others, last = (end - start for start, end in pairwise(ends))
        return *others, last + self.length - len(own)

    def _share(self, x: Tensor, dim: int) -> Tensor:
        mine = x.narrow(dim, self._own.start, len(self._own))
        missing = self.length - mine.shape[dim]
        return F.pad(mine, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else mine

    def gather(self, x: Tensor) -> Tensor:
        """Shares (B, n, C) of all ranks → (B, N, C); the gradient is that of the own share."""
        shares = [torch.empty_like(x) for _ in range(self.group.size())]
        dist.all_gather(shares, x.detach(), group=self.group)
        shares[self.group.rank()] = x
        return torch.cat(shares, 1)[:, : self.num_tokens]

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
    ) -> Tensor:
        """Attention of this rank's tokens to those of all ranks; all (B, H, n, Dh). `documents`
        are those of all tokens."""
        whole = Trade.apply(torch.cat((q, k, v), -1), 1, 2, self.group)  # (B, H/P, n·P, 3·Dh)
        q, k, v = whole[:, :, : self.num_tokens].chunk(3, -1)
        h = attention(q, k, v, documents=documents)  # (B, H/P, N, Dh)
        h = F.pad(h, (0, 0, 0, whole.shape[2] - self.num_tokens))
        return Trade.apply(h, 2, 1, self.group)


class Trade(Function):
    """Parts of dimension `given` go to the ranks of a group, in their order; what comes from them
    is joined along `taken`. Going back, the gradient takes the way home."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: int, taken: int, group: dist.ProcessGroup) -> Tensor:
        ctx.way = given, taken, group
        return _trade(x, given, taken, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given, taken, group = ctx.way
        return _trade(grad, taken, given, group), None, None, None


def _trade(x: Tensor, given: int, taken: int, group: dist.ProcessGroup) -> Tensor:
    parts = x.unflatten(given, (group.size(), -1)).movedim(given, 0).contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received.movedim(0, taken).flatten(taken, taken + 1)
