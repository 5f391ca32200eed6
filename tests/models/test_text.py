"""Text encoding against the stock pipeline; bytes, cleaning, limits."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from longtake.models.text import TextConfig, TextEncoder, Tokenizer, clean_caption

CONFIG = TextConfig(max_length=40, d_model=16, num_layers=2, num_heads=2, d_ff=24)
CAPTIONS = ["a red ball", "", "  two &amp;amp; three\n\tsquares  ", "红球向右移动", "x" * 100]


def stock_embeds(encoder: torch.nn.Module, tokenizer: Any, length: int) -> torch.Tensor:
    """The pipeline's own method on our parts, without building the rest of the pipeline."""
    stub = SimpleNamespace(
        text_encoder=encoder, tokenizer=tokenizer, _execution_device=torch.device("cpu")
    )
    return WanPipeline._get_t5_prompt_embeds(
        cast(Any, stub), CAPTIONS, max_sequence_length=length, device=torch.device("cpu")
    )


@torch.no_grad()
def test_equals_the_stock_pipeline() -> None:
    torch.manual_seed(0)
    encoder, tokenizer = TextEncoder(CONFIG), Tokenizer(CONFIG)
    embeds, lens = encoder(tokenizer(CAPTIONS))
    assert embeds.shape == (5, 40, 16) and lens.tolist() == [11, 1, 20, 19, 40]
    expected = stock_embeds(encoder.encoder, ByT5Tokenizer(), 40)
    assert expected.std() > 0.1
    torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_pretrained_folder_is_frozen_and_equals_the_stock_pipeline(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = UMT5EncoderModel(
        UMT5Config(vocab_size=384, d_model=12, d_kv=6, d_ff=20, num_layers=1, num_heads=2)
    ).eval()
    source.save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    config = TextConfig(kind="pretrained", path=str(tmp_path), max_length=24)
    encoder, tokenizer = TextEncoder(config), Tokenizer(config)
    assert encoder.embed_dim == 12
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().encoder.training  # dropout of a frozen encoder stays off
    embeds, _ = encoder(tokenizer(CAPTIONS))
    expected = stock_embeds(source, ByT5Tokenizer(), 24)
    torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=0)


def test_one_caption_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    encoder, tokenizer = TextEncoder(CONFIG), Tokenizer(CONFIG)
    together, _ = encoder(tokenizer(CAPTIONS))
    for row, caption in zip(together, CAPTIONS, strict=True):
        alone, _ = encoder(tokenizer([caption]))
        torch.testing.assert_close(alone[0], row, atol=1e-5, rtol=0)


def test_trained_encoder_gets_gradients() -> None:
    encoder, tokenizer = TextEncoder(CONFIG), Tokenizer(CONFIG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeds, _ = encoder(tokenizer(CAPTIONS))
    embeds.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_cleaning() -> None:
    assert clean_caption(" a  b &amp;lt; cafÃ©\n") == "a b < café"


def test_ids_are_cut_with_the_end_mark_kept() -> None:
    tokenizer = Tokenizer(CONFIG)
    empty, long = tokenizer(["", "x" * 100])
    assert empty.tolist() == [1]
    assert len(long) == 40 and long[-1] == 1


def test_too_many_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"text\.max_length=40"):
        TextEncoder(CONFIG)([torch.ones(41, dtype=torch.int64)])


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"kind": "words"}, "text.kind=words"),
        ({"kind": "pretrained"}, "text.path"),
        ({"max_length": 0}, "text.max_length=0"),
        ({"d_model": 15}, "text.d_model=15"),
    ],
)
def test_wrong_configs_are_refused(change: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        TextConfig(**{"d_model": 16, "num_heads": 2, **change})


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="bert"):
        TextEncoder(TextConfig(kind="pretrained", path=str(tmp_path)))


def test_a_fresh_encoder_tells_orders_apart() -> None:
    """A word in two orders of the same words is not the same; with T5's own start .03 differ."""
    config = TextConfig()
    torch.manual_seed(0)
    encoder = TextEncoder(config)
    captions = ["a red one left of a blue one", "a blue one left of a red one"]
    embeds, _ = encoder(Tokenizer(config)(captions))
    first, other = (
        row[caption.index("red") :][:3] for row, caption in zip(embeds, captions, strict=True)
    )
    assert (first - other).norm() > 0.2 * first.norm()
