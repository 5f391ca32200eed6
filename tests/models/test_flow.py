"""Noising, targets, timesteps and the loss of rectified flow."""

import math
from typing import Any

import pytest
import torch

from longtake.models.flow import (
    TimestepConfig,
    add_noise,
    flow_loss,
    min_snr_weight,
    sample_timesteps,
    shift_for_tokens,
    shift_timesteps,
    velocity_from_clean_prediction,
    velocity_target,
)

SHAPE = (3, 4, 2, 4, 6)


def draws() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, *SHAPE, generator=generator)
    return clean, noise, torch.tensor([0.1, 0.5, 0.9])


def test_ends_of_the_path() -> None:
    clean, noise, _ = draws()
    assert torch.equal(add_noise(clean, noise, torch.zeros(3)), clean)
    torch.testing.assert_close(add_noise(clean, noise, torch.ones(3)), noise)


def test_velocity_leads_from_any_level_to_clean() -> None:
    clean, noise, t = draws()
    noisy = add_noise(clean, noise, t)
    step = t.view(-1, 1, 1, 1, 1) * velocity_target(clean, noise)
    torch.testing.assert_close(noisy - step, clean)
    torch.testing.assert_close(
        velocity_from_clean_prediction(clean, noisy, t),
        velocity_target(clean, noise),
        atol=1e-5,
        rtol=1e-4,
    )


def test_loss_is_a_sum_of_token_means_over_noisy_tokens() -> None:
    clean, noise, t = draws()
    given = torch.zeros(SHAPE[2:], dtype=torch.bool)
    given[0] = True
    output = velocity_target(clean, noise).clone()
    output[:, :, 0] += 100  # on given latents: no loss
    output[1, :, 1, :2, :2] += 3  # one token of sample 1 off by 3 everywhere
    output[2, 0, 1, 0, 0] += 4  # one of 4 channels of one of 4 latents of a token
    loss = flow_loss(output, clean, noise, t, given, prediction="velocity", patch_size=(1, 2, 2))
    torch.testing.assert_close(loss, torch.tensor([0.0, 9.0, 1.0]), atol=1e-4, rtol=1e-4)


def test_clean_prediction_has_the_velocity_loss() -> None:
    clean, noise, t = draws()
    noisy, given = add_noise(clean, noise, t), torch.zeros(SHAPE[2:], dtype=torch.bool)
    guess = clean + 0.1 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    as_clean = flow_loss(guess, clean, noise, t, given, prediction="clean", patch_size=(1, 1, 1))
    velocity = velocity_from_clean_prediction(guess, noisy, t)
    as_velocity = flow_loss(
        velocity, clean, noise, t, given, prediction="velocity", patch_size=(1, 1, 1)
    )
    torch.testing.assert_close(as_clean, as_velocity, atol=1e-2, rtol=1e-3)


def test_loss_is_fp32_and_per_sample() -> None:
    clean, noise, t = draws()
    given = torch.zeros(SHAPE[2:], dtype=torch.bool)
    output = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).bfloat16()
    loss = flow_loss(output, clean, noise, t, given, prediction="velocity", patch_size=(1, 2, 2))
    assert loss.dtype == torch.float32
    for i in range(3):
        one = slice(i, i + 1)
        alone = flow_loss(
            output[one], clean[one], noise[one], t[one], given,
            prediction="velocity", patch_size=(1, 2, 2),
        )  # fmt: skip
        assert torch.equal(alone, loss[one])


def test_shift() -> None:
    t = torch.linspace(0, 1, 11)
    assert torch.equal(shift_timesteps(t, 1.0), t)
    shifted = shift_timesteps(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted[1:-1] > t[1:-1]).all()
    assert shift_timesteps(torch.tensor(0.5), 3.0) == 0.75
    assert shift_for_tokens(torch.tensor(4096), 1024) == 2.0


def test_timesteps_follow_their_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(200_000, generator=generator)
    normal = torch.randn(200_000, generator=generator)
    pure = sample_timesteps(uniform, normal, TimestepConfig(mean=0.5, std=0.8, uniform_share=0.0))
    logits = torch.logit(pure.double())
    assert math.isclose(logits.mean(), 0.5, abs_tol=0.01)
    assert math.isclose(logits.std(), 0.8, abs_tol=0.01)
    flat = sample_timesteps(uniform, normal, TimestepConfig(uniform_share=1.0))
    assert torch.equal(flat, uniform)
    mixed = sample_timesteps(uniform, normal, TimestepConfig(mean=8.0, uniform_share=0.2))
    assert math.isclose((mixed < 0.5).float().mean(), 0.1, abs_tol=0.005)


def test_mode_sampling_has_the_density_of_its_paper() -> None:
    """SD3 eq. 20: t at quantile q is f(1 − q); with scale 0 that is uniform. And every distribution
    keeps its uniform floor and its shift, which grows with the root of the tokens."""
    q = torch.linspace(0.01, 0.99, 99)
    normal, never = torch.special.ndtri(q), torch.ones(99)
    for scale in (0.0, 0.8, 1.29):
        config = TimestepConfig(distribution="mode", mode_scale=scale, uniform_share=0.0)
        t = sample_timesteps(never, normal, config)
        wanted = [1 - u - scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u) for u in q.tolist()]
        torch.testing.assert_close(t, torch.tensor(wanted), atol=1e-5, rtol=0)
    floor = TimestepConfig(distribution="mode", uniform_share=0.1)
    assert torch.allclose(sample_timesteps(q / 10, normal, floor), q)
    config = TimestepConfig(distribution="uniform", shift=2.0, base_tokens=64)
    tokens = torch.full((99,), 256)
    torch.testing.assert_close(sample_timesteps(q, normal, config, tokens), shift_timesteps(q, 4.0))


def test_min_snr_weighs_the_clean_error() -> None:
    t = torch.tensor([0.05, 0.3, 0.5, 0.9])
    snr = ((1 - t) / t).square()
    # the clean error is t² times that of the velocity
    torch.testing.assert_close(min_snr_weight(t, 5.0), snr.clamp_max(5.0) * t.square())


@pytest.mark.parametrize(
    "change", [{"std": 0.0}, {"uniform_share": 1.5}, {"shift": 0.0}], ids=lambda c: next(iter(c))
)
def test_wrong_distributions_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"timesteps.{next(iter(change))}"):
        TimestepConfig(**change)
