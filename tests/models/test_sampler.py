"""The sampler against the stock scheduler, guidance, given latents; a DiT that overfits."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from longtake.models.conditioning import given_frames, given_mask, noise_levels
from longtake.models.dit import DiT, DiTConfig
from longtake.models.flow import (
    Prediction,
    TimestepConfig,
    add_noise,
    flow_loss,
    sample_timesteps,
)
from longtake.models.sampler import Given, SamplerConfig, TextInput, sample, schedule
from longtake.models.tokens import Segment

SHAPE = (2, 3, 2, 4, 4)


class Toy:
    """A denoiser with a known, non-linear answer that depends on everything it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor | None, Tensor | None]] = []

    def __call__(
        self,
        latents: Tensor,
        t: Tensor | None,
        text_embeds: Tensor,
        text_lens: Tensor | None = None,
        *,
        levels: Tensor | None = None,
        level_index: Tensor | None = None,
        extra: Sequence[Segment] = (),
        extra_t: Tensor | None = None,
    ) -> Tensor:
        assert t is not None
        self.calls.append((levels, level_index))
        return torch.sin(latents * 2) * t.view(-1, 1, 1, 1, 1) + text_embeds.mean()


def noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def text(value: float) -> TextInput:
    return TextInput(torch.full((2, 3, 4), value))


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 24])
def test_equals_the_stock_scheduler(shift: float, steps: int) -> None:
    stock: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(steps)
    torch.testing.assert_close(schedule(steps, shift), stock.sigmas, atol=1e-7, rtol=0)
    config = SamplerConfig(steps=steps, shift=shift, guidance_scale=2.5)
    found = sample(Toy(), noise(), text(0.3), config=config, negative=text(-0.1))
    latents, toy = noise(), Toy()
    for t in stock.timesteps:
        level = t.expand(2) / 1000
        empty = toy(latents, level, text(-0.1).embeds)
        velocity = empty + 2.5 * (toy(latents, level, text(0.3).embeds) - empty)
        latents = stock.step(velocity, t, latents, return_dict=False)[0]
    torch.testing.assert_close(found, latents, atol=1e-5, rtol=0)


def test_unipc_equals_the_stock_scheduler_and_mends_given_frames() -> None:
    stock: Any = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    stock.set_timesteps(6)
    latents, toy = noise(), Toy()
    for t in stock.timesteps:
        velocity = toy(latents, t.expand(2) / 1000, text(0.3).embeds)
        latents = stock.step(velocity, t, latents, return_dict=False)[0]
    config = SamplerConfig(steps=6, guidance_scale=1.0, solver="unipc")
    torch.testing.assert_close(sample(Toy(), noise(), text(0.3), config=config), latents)
    mask = given_mask(given_frames("i2v", 2), (2, 4, 4)).expand(2, 2, 4, 4)
    known = Given(torch.full(SHAPE, 7.0), mask, (1, 2, 2), level=0.25)
    shown: list[Tensor] = []

    def watched(latents: Tensor, *args: Any, **levels: Any) -> Tensor:
        shown.append(latents)
        assert torch.equal(levels["levels"][:, 1], torch.full((2,), 0.25))
        return toy(latents, *args, **levels)

    found = sample(watched, noise(), text(0.3), config=config, given=known)
    for seen in shown:
        torch.testing.assert_close(seen[:, :, 0], 0.75 * 7 + 0.25 * noise()[:, :, 0])
    assert (found[:, :, 0] == 7).all()


def test_guidance_needs_the_empty_prompt() -> None:
    with pytest.raises(ValueError, match=r"sampler\.guidance_scale=4\.0"):
        sample(Toy(), noise(), text(0.0), config=SamplerConfig(guidance_scale=4.0))
    toy = Toy()
    sample(toy, noise(), text(0.0), config=SamplerConfig(steps=5, guidance_scale=1.0))
    assert len(toy.calls) == 5


def test_given_latents_stay_and_are_told_as_clean() -> None:
    mask = torch.stack([given_mask(given_frames(task, 2), (2, 4, 4)) for task in ("i2v", "t2v")])
    known = torch.full(SHAPE, 7.0)
    toy, steps = Toy(), []
    found = sample(
        toy,
        noise(),
        text(0.0),
        config=SamplerConfig(steps=3, guidance_scale=1.0),
        given=Given(known, mask, (1, 2, 2)),
        on_step=steps.append,
    )
    assert steps == [0, 1, 2]
    assert (found[0, :, 0] == 7).all() and not (found[0, :, 1] == 7).any()
    free = sample(toy, noise(), text(0.0), config=SamplerConfig(steps=3, guidance_scale=1.0))
    torch.testing.assert_close(found[1], free[1])
    levels, index = toy.calls[0]
    assert levels is not None and index is not None
    assert torch.equal(levels.gather(1, index), torch.tensor([[0.0] * 4 + [1.0] * 4, [1.0] * 8]))


def test_segments_are_shown_at_their_level_in_every_call() -> None:
    segment, seen = Segment(torch.ones(2, 3, 1, 4, 4), 1.0), []

    def watched(*args: Any, **conditions: Any) -> Tensor:
        seen.append((list(conditions["extra"]), conditions["extra_t"].tolist()))
        return Toy()(*args, **conditions)

    nothing = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    given = Given(torch.zeros(SHAPE), nothing, (1, 2, 2), 0.25, [segment])
    config = SamplerConfig(steps=2, guidance_scale=2.0)
    found = sample(watched, noise(), text(0.1), config=config, negative=text(0.0), given=given)
    assert seen == [([segment], [0.25, 0.25])] * 4
    free = sample(Toy(), noise(), text(0.1), config=config, negative=text(0.0))
    assert torch.equal(found, free)  # their place in the video is drawn


def test_perfect_clean_prediction_lands_on_the_clip() -> None:
    clip = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    found = sample(
        lambda *_args, **_kwargs: clip,
        noise(),
        text(0.0),
        config=SamplerConfig(steps=4, guidance_scale=1.0),
        prediction="clean",
    )
    torch.testing.assert_close(found, clip, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"shift": 0.0}, {"guidance_scale": 0.5}], ids=lambda c: next(iter(c))
)
def test_wrong_configs_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=f"sampler.{next(iter(change))}"):
        SamplerConfig(**change)


@pytest.mark.parametrize(("prediction", "task"), [("velocity", "t2v"), ("clean", "i2v")])
def test_dit_overfits_eight_clips(prediction: Prediction, task: str) -> None:
    """Trained on 8 captioned clips, it draws the clip its caption (and first frame) names."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(8, 4, 1, 1, 1, generator=generator)
    for shape in ((8, 4, 2, 1, 1), (8, 4, 1, 4, 1), (8, 4, 1, 1, 4)):
        clips = clips + 0.5 * torch.randn(shape, generator=generator)
    captions = torch.randn(8, 2, 16, generator=generator)
    config = DiTConfig(
        in_channels=4, out_channels=4, hidden_size=64, num_heads=2, depth=2, ffn_dim=128,
        text_dim=16, freq_dim=64,
    )  # fmt: skip
    dit = DiT(config)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=4e-3, weight_decay=0.0, fused=True)
    mask = given_mask(given_frames(task, 2), (2, 4, 4)).expand(32, -1, -1, -1)
    rows = torch.arange(32) % 8
    num_steps = 400
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 20) * (1 - step / num_steps)
        draws = torch.rand(32, generator=generator), torch.randn(32, generator=generator)
        t = sample_timesteps(*draws, TimestepConfig(shift=2.0))
        eps = torch.randn(32, 4, 2, 4, 4, generator=generator)
        clean = clips[rows]
        noisy = torch.where(mask[:, None], clean, add_noise(clean, eps, t))
        levels, index = noise_levels(t, mask, config.patch_size)
        output = dit(noisy, t, captions[rows], levels=levels, level_index=index)
        loss = flow_loss(
            output, clean, eps, t, mask, prediction=prediction, patch_size=config.patch_size
        )
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    known = Given(clips, mask[:8], config.patch_size) if task == "i2v" else None
    drawn = sample(
        dit,
        torch.randn(8, 4, 2, 4, 4, generator=generator),
        TextInput(captions),
        config=SamplerConfig(steps=12, guidance_scale=1.0),
        prediction=prediction,
        given=known,
    )
    error = (drawn - clips).flatten(1).square().mean(1) / clips.flatten(1).var(1)
    assert (error < 0.2).all(), error
    distance = (drawn[:, None] - clips).flatten(2).square().sum(2)
    assert torch.equal(distance.argmin(1), torch.arange(8))
