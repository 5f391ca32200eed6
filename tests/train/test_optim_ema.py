import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from longtake.train.ema import Ema, EmaConfig
from longtake.train.engine import single_process
from longtake.train.optim import OptimConfig, build_adamw, lr_at, parameter_groups
from tests.train import tiny

CONFIG = OptimConfig(
    lr=1.0,
    betas=(0.9, 0.99),
    eps=1e-8,
    weight_decay=0.1,
    warmup_steps=4,
    schedule="cosine",
    min_lr_ratio=0.1,
    max_grad_norm=1.0,
    muon=[],
    muon_lr_scale=2.5,
)


def test_the_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    rates = [lr_at(CONFIG, step, 104) for step in range(110)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[54] == pytest.approx(0.55)  # half-way
    assert rates[104] == pytest.approx(0.1)
    assert rates[109] == pytest.approx(0.1)
    assert rates[4:105] == sorted(rates[4:105], reverse=True)


def test_a_constant_schedule_stays_at_the_peak() -> None:
    config = replace(CONFIG, schedule="constant", warmup_steps=0)
    assert {lr_at(config, step, 10) for step in range(20)} == {1.0}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0.0),
        ("betas", (0.9, 1.0)),
        ("eps", 0.0),
        ("weight_decay", -1.0),
        ("warmup_steps", -1),
        ("schedule", "linear"),
        ("min_lr_ratio", 2.0),
        ("max_grad_norm", -1.0),
    ],
)
def test_wrong_values_name_the_key(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"optim\.{key}="):
        replace(CONFIG, **{key: value})


class Shapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv3d(4, 4, 3)
        self.gamma = nn.Parameter(torch.ones(4, 2, 1, 1))
        self.gain = nn.Parameter(torch.ones(4, 1, 1, 1))
        self.scale_shift_table = nn.Parameter(torch.ones(1, 6, 4))
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)


def test_only_matrices_and_kernels_decay() -> None:
    module = Shapes()
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, 0.1)
    decayed = {names[p] for p in groups[0]["params"]}
    others = {names[p] for p in groups[1]["params"]}
    assert decayed == {"linear.weight", "conv.weight"}
    assert "frozen" not in others
    assert decayed | others == {n for n, p in module.named_parameters() if p.requires_grad}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert build_adamw(module, CONFIG).defaults["fused"]


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(nn.Identity(), 0.1)


def test_the_mean_follows_its_formula_and_swaps_in_and_out() -> None:
    engine = tiny.build(single_process(), "ddp")
    ema = Ema(engine, EmaConfig(0.8))
    weight = engine.module.get_parameter("first.weight")
    mean = weight.detach().clone()
    for step in range(12):
        tiny.train(engine, range(step, step + 1), ema=ema)
        decay = min(0.8, (2 + step) / (11 + step))
        mean = decay * mean + (1 - decay) * weight.detach()
    trained = weight.detach().clone()
    with ema.swapped(engine):
        assert torch.allclose(weight, mean, atol=1e-6)
        assert not torch.allclose(weight, trained, atol=1e-4)
        with pytest.raises(AssertionError):
            ema.update(13)
    assert torch.equal(weight, trained)


def test_after_an_error_nothing_is_swapped_back_or_saved() -> None:
    """Swapping back is a collective under ZeRO: a rank that raised must not wait for the others."""
    engine = tiny.build(single_process(), "ddp")
    ema = Ema(engine, EmaConfig(0.5))
    with pytest.raises(ZeroDivisionError), ema.swapped(engine):
        math.fmod(1 // 0, 1)
    with pytest.raises(AssertionError, match="the mean is in the module"):
        list(ema.owned_ranges())


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.25])
def test_a_power_function_remembers_its_share_of_the_training(sigma: float) -> None:
    """The weights of the past steps have the relative deviation asked for, at any length."""
    config = EmaConfig(0.9, sigma_rel=sigma)
    for num_steps in (1000, 4000):
        kept = [config.decay_at(step) for step in range(1, num_steps + 1)]
        after = np.cumprod([1.0, *kept[:0:-1]])[::-1]  # what is left of step t at the end
        weights = (1.0 - np.array(kept)) * after
        times = np.arange(1, num_steps + 1) / num_steps
        mean = (weights * times).sum()
        assert weights.sum() == pytest.approx(1.0)
        assert ((weights * (times - mean) ** 2).sum() ** 0.5) == pytest.approx(sigma, rel=0.02)


@pytest.mark.parametrize(
    ("values", "word"),
    [((1.0,), r"ema.decay=1.0 must lie in \[0, 1\)"), ((0.9, 0.3), "ema.sigma_rel=0.3 must lie")],
)
def test_a_memory_that_cannot_be_is_refused(values: tuple[float, ...], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        EmaConfig(*values)
