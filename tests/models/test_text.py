"""Text encoding against the stock pipeline; bytes, words, cleaning, limits."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from longtake.data.world import FAMILIES, make_clip
from longtake.models.text import TextConfig, TextEncoder, Tokenizer, clean_caption

CONFIG = TextConfig(max_length=40, d_model=16, num_layers=2, num_heads=2, d_ff=24)
WORDS = TextConfig("words", max_length=12, d_model=16, num_heads=2, d_ff=24, vocab_size=16384)
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


@pytest.mark.parametrize("config", [CONFIG, WORDS])
def test_one_caption_does_not_depend_on_the_others(config: TextConfig) -> None:
    torch.manual_seed(0)
    encoder, tokenizer = TextEncoder(config), Tokenizer(config)
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


def test_words_are_one_token_whatever_stands_around_them() -> None:
    one, other, chinese, empty, long = Tokenizer(WORDS)(
        ["A Ball, left of two", "two: left balls; of a ball", "红球 moves", "", "red " * 30]
    )
    a, ball, comma, left, of, two, end = one.tolist()
    assert len({a, ball, comma, left, of, two, end}) == 7 and end == 1
    assert other.tolist()[2] == left and other.tolist()[-2] == ball and other.tolist()[0] == two
    assert other.tolist()[3] not in (ball, left)  # "balls" is another word
    assert len(chinese) == 4  # each sign is a word
    assert empty.tolist() == [1] and len(long) == 12 and long[-1] == 1
    assert max(map(max, (one, other, chinese))) < WORDS.vocab_size


def test_no_two_words_of_the_world_share_a_row() -> None:
    captions = [
        make_clip(0, "train", index, families=tuple(FAMILIES), frames=17, height=64, width=64)
        for index in range(300)
    ]
    tokenizer = Tokenizer(TextConfig("words", max_length=200, vocab_size=16384))
    rows: dict[int, set[str]] = {}
    for clip in captions:
        for kind in ("dense", "short", "vague"):
            words = re.findall(r"\w+|[^\w\s]", clip.captions[kind].lower())
            for word in words:
                rows.setdefault(int(tokenizer([word])[0][0]), set()).add(word)
    assert len(rows) > 100
    assert {len(words) for words in rows.values()} == {1}, rows


def test_too_many_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"text\.max_length=40"):
        TextEncoder(CONFIG)([torch.ones(41, dtype=torch.int64)])


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"kind": "chars"}, "text.kind=chars"),
        ({"vocab_size": 258}, "text.vocab_size=258"),
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


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_a_fresh_encoder_tells_orders_apart(kind: Literal["bytes", "words"]) -> None:
    """A word in two orders of the same words is not the same; with T5's own start .03 differ."""
    config = TextConfig(kind)
    torch.manual_seed(0)
    encoder = TextEncoder(config)
    captions = ["a red one left of a blue one", "a blue one left of a red one"]
    ids = Tokenizer(config)(captions)
    embeds, _ = encoder(ids)
    (red,) = Tokenizer(config)(["red"])
    first, other = (
        row[number.tolist().index(int(red[0])) :][: len(red) - 1]
        for row, number in zip(embeds, ids, strict=True)
    )
    assert (first - other).norm() > 0.2 * first.norm()
