"""Numbers as tokens behind the text: nothing at first, nothing where they are not told."""

from math import nan

import pytest
import torch
from torch import Tensor

from longtake.models.dit import DiT, DiTConfig
from longtake.models.numbers import NumberTokens
from longtake.models.sampler import TextInput

LENGTHS = [3, 7, 8]  # of 8: room for both numbers, for one, for none
VALUES = torch.tensor([[8.0, 0.3], [24.0, nan], [nan, 0.7]])
SOURCES = {"motion": "motion_score", "fps": "fps"}
UNTOLD = torch.full((3, 2), nan)


@pytest.fixture
def dit() -> DiT:
    torch.manual_seed(0)
    dit = DiT(DiTConfig(4, 4, hidden_size=24, num_heads=2, depth=2, ffn_dim=32, text_dim=12))
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return dit


def text() -> TextInput:
    torch.manual_seed(1)
    embeds = torch.randn(3, 8, 12)
    for row, length in zip(embeds, LENGTHS, strict=True):
        row[length:] = 0
    return TextInput(embeds, torch.tensor(LENGTHS))


def predict(dit: DiT, text: TextInput) -> Tensor:
    latents = torch.randn(3, 4, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    return dit(latents, torch.tensor([0.2, 0.5, 0.9]), text.embeds, text.lens)


def learnt() -> NumberTokens:
    numbers = NumberTokens(SOURCES, 12)
    with torch.no_grad():
        for parameter in numbers.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return numbers


def test_a_fresh_module_computes_what_there_was_without_it(dit: DiT) -> None:
    told = NumberTokens(SOURCES, 12)(text(), VALUES)
    assert torch.equal(told.embeds, text().embeds)
    torch.testing.assert_close(predict(dit, told), predict(dit, text()), atol=1e-5, rtol=1e-5)


def test_what_is_not_told_changes_nothing(dit: DiT) -> None:
    numbers = learnt()
    told = numbers(text(), UNTOLD)
    assert torch.equal(told.embeds, text().embeds)
    torch.testing.assert_close(predict(dit, told), predict(dit, text()), atol=1e-5, rtol=1e-5)
    assert list(numbers.sources) == ["fps", "motion"]  # whatever the order they are named in
    before = predict(dit, numbers(text(), VALUES))
    for row, column in ((0, 0), (0, 1), (1, 0), (2, 1)):
        other = VALUES.clone()
        other[row, column] *= 1.5
        moved = (predict(dit, numbers(text(), other)) - before).flatten(1).abs().amax(1)
        assert [bool(x > 1e-4) for x in moved] == [one == row for one in range(3)]


def test_gradients_reach_every_layer_of_what_is_told(dit: DiT) -> None:
    fresh = NumberTokens(SOURCES, 12)
    for numbers, layers in ((fresh, {"fc2"}), (learnt(), {"fc1", "fc2"})):
        predict(dit, numbers(text(), VALUES)).square().sum().backward()
        for name, parameter in numbers.named_parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == (name.split(".")[-2] in layers), name
        numbers.zero_grad()
        predict(dit, numbers(text(), UNTOLD)).square().sum().backward()
        for parameter in numbers.parameters():
            assert parameter.grad is not None and not parameter.grad.any()  # ranks stay alike


def test_weights_in_bf16_tell_the_same() -> None:
    numbers = learnt()
    expected = numbers(text(), VALUES)
    found = numbers.bfloat16()(text(), VALUES)
    assert (expected.embeds - text().embeds).abs().max() > 1
    torch.testing.assert_close(found.embeds, expected.embeds, atol=0.1, rtol=0.05)
