"""Captions to embeddings, as the stock Wan pipeline does it.

Three kinds: `bytes` and `words`, small UMT5 encoders that are trained with the DiT and need no
vocabulary file, over ByT5's byte tokens or over whole words, and `pretrained`, any T5 or UMT5
encoder of transformers, frozen.
transformers is imported when an encoder or tokenizer is built, not before.
"""

import html
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longtake.models.transfer import to_device

NUM_MARKS, END_MARK = 3, 1  # of ByT5: padding, end and unknown come before what is said


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the encoder. `max_length` counts tokens with the end mark and is fixed for a run;
    `too_long` says what training does with captions that it cuts.

    With kind `pretrained`, `path` is a hub id or folder and the other sizes are read from it.
    """

    kind: Literal["bytes", "words", "pretrained"] = "bytes"
    max_length: int = 128
    d_model: int = 128
    num_layers: int = 2
    num_heads: int = 4
    d_ff: int = 256
    vocab_size: int = 384  # rows of the table: of bytes 256, 3 marks and ByT5's 125 spare ids
    path: str = ""
    too_long: Literal["truncate", "refuse"] = "truncate"

    def __post_init__(self) -> None:
        if self.kind not in ("bytes", "words", "pretrained"):
            raise ValueError(f"text.kind={self.kind} must be bytes, words or pretrained")
        if self.too_long not in ("truncate", "refuse"):
            raise ValueError(f"text.too_long={self.too_long} must be truncate or refuse")
        if self.max_length < 1:
            raise ValueError(f"text.max_length={self.max_length} must be at least 1")
        if self.kind == "pretrained" and not self.path:
            raise ValueError("text.path is empty: text.kind=pretrained needs a hub id or a folder")
        least = NUM_MARKS + (256 if self.kind == "bytes" else 1)
        if self.is_trained and self.vocab_size < least:
            raise ValueError(f"text.vocab_size={self.vocab_size} must be at least {least}")
        if self.is_trained and self.d_model % self.num_heads:
            raise ValueError(
                f"text.d_model={self.d_model} must be divisible by text.num_heads={self.num_heads}"
            )

    @property
    def is_trained(self) -> bool:
        """Whether the encoder learns with the DiT and lives in its checkpoints."""
        return self.kind != "pretrained"


def clean_caption(caption: str) -> str:
    """Repair broken Unicode, undo HTML escapes twice, and squeeze white space."""
    import ftfy

    caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return re.sub(r"\s+", " ", caption.strip()).strip()


class WordHashes:
    """Ids of words, lower case, and of other signs: each word's hash is its row of the table.

    The hashing trick (arXiv 0902.2206): no vocabulary, and a few words share a row. Chinese
    characters are words. Words are told apart as BERT does it.
    """

    def __init__(self, vocab_size: int) -> None:
        from tokenizers.normalizers import BertNormalizer
        from tokenizers.pre_tokenizers import BertPreTokenizer

        self.num_rows = vocab_size - NUM_MARKS
        self.normalize = BertNormalizer().normalize_str
        self.split = BertPreTokenizer().pre_tokenize_str

    def __call__(self, caption: str) -> list[int]:
        """Ids without the end mark."""
        words = [word.encode() for word, _ in self.split(self.normalize(caption))]
        return [NUM_MARKS + zlib.crc32(word) % self.num_rows for word in words]


class Tokenizer:
    """Captions → token ids without padding, cleaned, with the end mark, cut at `max_length`."""

    def __init__(self, config: TextConfig) -> None:
        from transformers import ByT5Tokenizer

        self.config = config
        self.tokenizer: Any = None  # of transformers
        if config.kind == "words":
            self.words = WordHashes(config.vocab_size)
        else:
            self.tokenizer = (
                ByT5Tokenizer() if config.kind == "bytes" else _load_tokenizer(config.path)
            )

    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """Ids (L,) int64 of each caption; "" gives the end mark alone."""
        cleaned = [clean_caption(caption) for caption in captions]
        limit = self.config.max_length
        if self.config.kind == "words":
            ids = [self.words(caption)[: limit - 1] + [END_MARK] for caption in cleaned]
        else:
            ids = self.tokenizer(
                cleaned, max_length=limit, truncation=True, add_special_tokens=True
            ).input_ids
        return [torch.tensor(row, dtype=torch.int64) for row in ids]

    def num_tokens(self, caption: str) -> int:
        """Tokens of the whole caption with the end mark, however many."""
        cleaned = clean_caption(caption)
        if self.config.kind == "words":
            return len(self.words(cleaned)) + 1
        return len(self.tokenizer(cleaned, add_special_tokens=True, verbose=False).input_ids)


class TextEncoder(nn.Module):
    """Token ids → embeddings (B, max_length, d_model), zero after each caption's end."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        from transformers import UMT5Config, UMT5EncoderModel

        self.config = config
        if not config.is_trained:
            self.encoder: Any = _load_encoder(config.path).eval().requires_grad_(False)
            return
        self.encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=config.vocab_size,
                d_model=config.d_model,
                d_kv=config.d_model // config.num_heads,
                d_ff=config.d_ff,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
            )
        )
        self.init_neighbourhoods()

    @torch.no_grad()
    def init_neighbourhoods(self) -> None:
        """Half of the heads start by looking at the tokens before their own, half at those behind.

        T5 starts with hardly any preference, and each token sees the mean of its caption: a red
        ball left of a blue one is then the same as the other way round, and stays so. Slopes as in
        ALiBi (arXiv 2108.12409), with a reach of 4 to 16 bytes, or 1 to 4 words; training moves
        them freely.
        """
        farthest = 16 if self.config.kind == "bytes" else 4
        config = self.encoder.config
        half, pairs = config.relative_attention_num_buckets // 2, max(config.num_heads // 2, 1)
        near, number = half // 2, torch.arange(half)  # buckets hold one distance, then ever more
        ratio = config.relative_attention_max_distance / near
        distance = torch.where(number < near, number, near * ratio ** ((number - near) / near))
        away = torch.full((half,), -8.0)
        for name, module in self.encoder.named_modules():
            if not name.endswith("relative_attention_bias"):
                continue
            for head in range(config.num_heads):
                reach = farthest / 4 ** (head // 2 / max(pairs - 1, 1))
                sides = (-distance / reach, away)  # buckets of tokens before come first
                module.weight[:, head] = torch.cat(sides if head % 2 == 0 else sides[::-1])
                module.weight[0, head] = -2.0  # the token itself, which the residual carries

    def train(self, mode: bool = True) -> "TextEncoder":
        """Training mode; a frozen encoder stays in evaluation mode, its dropout off."""
        super().train(mode)
        if not self.config.is_trained:
            self.encoder.eval()
        return self

    @property
    def embed_dim(self) -> int:
        """Width of the embeddings."""
        return int(self.encoder.config.d_model)

    def forward(self, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Ids of each caption (L,) → embeds (B, max_length, D), lens (B,) on the CPU.

        ValueError for a caption longer than `max_length`.
        """
        lens = torch.tensor([len(row) for row in ids])
        longest, limit = int(lens.max()), self.config.max_length
        if longest > limit:
            raise ValueError(f"caption of {longest} tokens: text.max_length={limit} is the limit")
        device = self.encoder.get_input_embeddings().weight.device
        padded = to_device(nn.utils.rnn.pad_sequence(list(ids), batch_first=True), device)
        mask = torch.arange(longest)[None] < lens[:, None]
        mask = to_device(mask, device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.is_trained):
            embeds = self.encoder(padded, mask.long()).last_hidden_state
        embeds = embeds * mask[..., None]
        return nn.functional.pad(embeds, (0, 0, 0, limit - longest)), lens

    @torch.no_grad()
    def rows(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Embeddings (L, D) of each caption on the CPU, without padding: what a cache holds."""
        embeds, lens = self(ids)
        return [row[:length].cpu() for row, length in zip(embeds, lens.tolist(), strict=True)]


def embed_dim(config: TextConfig) -> int:
    """Width of the embeddings, known without loading the encoder."""
    from transformers import AutoConfig

    if config.is_trained:
        return config.d_model
    return int(AutoConfig.from_pretrained(config.path).d_model)


def _load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer, ByT5Tokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    # AutoTokenizer goes by the model type, which says nothing about a byte tokenizer.
    if get_tokenizer_config(path).get("tokenizer_class") == "ByT5Tokenizer":
        return ByT5Tokenizer.from_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def _load_encoder(path: str) -> nn.Module:
    from transformers import AutoConfig, T5EncoderModel, UMT5EncoderModel

    kind = AutoConfig.from_pretrained(path).model_type
    if kind not in ("t5", "umt5"):
        raise ValueError(f"text.path={path} holds a {kind} model: only t5 and umt5 encoders work")
    return (UMT5EncoderModel if kind == "umt5" else T5EncoderModel).from_pretrained(path)
