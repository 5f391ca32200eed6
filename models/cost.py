"""What a forward pass of the DiT costs, in closed form: the numerator of MFU."""

import math

from longtake.models.dit import DiTConfig


def forward_flops(
    config: DiTConfig, num_tokens: int, *, text_rows: int, text_keys: int, num_levels: int = 1
) -> int:
    """Floating-point operations of one sample; a multiply-add counts two, as in FlopCounterMode.

    num_tokens: video tokens N. text_rows: rows of text that are projected, equal padding rows once.
    text_keys: keys of text that every token attends to, padding included. num_levels: noise levels
    K; finding each token's level is not counted. A training step costs three times as much: model
    FLOPs count no recomputation.
    """
    dim, patch_volume = config.hidden_size, math.prod(config.patch_size)
    per_token = (config.in_channels + config.out_channels) * patch_volume * dim + config.depth * (
        (4 + 2) * dim**2 + 2 * dim * config.ffn_dim  # self-attention, cross-attention, MLP
    )
    per_row = (config.text_dim + dim) * dim + config.depth * 2 * dim**2
    per_level = (config.freq_dim + dim + 6 * dim) * dim
    pairs = config.depth * num_tokens * (num_tokens + text_keys)  # of queries and keys
    products = num_tokens * per_token + text_rows * per_row + num_levels * per_level
    return 2 * (products + 2 * dim * pairs)
