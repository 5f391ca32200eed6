"""The discriminator: a game that is the same on any ranks, after any resume, in any strategy."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.data.plan import Plan
from longtake.models.discriminator import Discriminator, DiscriminatorConfig
from longtake.train.adversary import Adversary
from longtake.train.config import parse_config
from longtake.train.ranks import single_process
from longtake.train.schema import VAERun
from longtake.train.tasks import LossSum
from tests.train.forked import run_ranks
from tests.train.tiny_runs import (
    TINY_GAN,
    losses,
    options,
    train_here,
    train_on_rank,
    tree,
)


def config_of(shards: Path, *more: str) -> VAERun:
    config = parse_config(tree(options(shards, shards / "run", *more, task=TINY_GAN)))
    assert isinstance(config, VAERun)
    return config


@pytest.fixture(scope="module")
def whole(shards: Path) -> Path:
    """An uninterrupted run on one rank."""
    assert train_here(options(shards, shards / "whole", task=TINY_GAN)) == 0
    return shards / "whole"


def test_patches_images_and_sizes() -> None:
    critic = Discriminator(DiscriminatorConfig(8, 3))
    assert critic(torch.zeros(2, 3, 9, 32, 24)).shape == (2, 1, 3, 4, 3)
    assert critic(torch.zeros(1, 3, 1, 16, 16)).shape == (1, 1, 1, 2, 2)
    with pytest.raises(ValueError, match="need 8 pixels"):
        critic.config.check_size(4, 16)


def test_verdicts_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    critic = Discriminator(DiscriminatorConfig(8, 2))
    clips = torch.randn(3, 3, 5, 16, 16)
    assert torch.allclose(critic(clips)[1:2], critic(clips[1:2]), atol=1e-6)


def test_parts_begin_when_they_should(whole: Path) -> None:
    critic, heard = losses(whole, "critic"), losses(whole, "adversarial")
    # Rows count steps from 1: the first lesson is that of optimizer step 2, heard two later.
    assert min(critic) == 3 and min(heard) == 5
    assert 0.5 < critic[3] < 4  # hinge of a fresh network: about 2
    weights = losses(whole, "adaptive_weight")
    assert all(0 < value <= 10 for value in weights.values())
    for name in ("r1", "lecam", "logits_real", "critic_grad_norm"):
        assert losses(whole, name).keys() == critic.keys(), name


def test_an_interrupted_game_goes_on_alike(shards: Path, whole: Path) -> None:
    folder = shards / "halves"
    assert train_here(options(shards, folder, "train.steps=8", task=TINY_GAN)) == 0
    assert train_here(options(shards, folder, "resume=force", task=TINY_GAN)) == 0
    for name in ("loss", "critic", "adversarial", "logits_real"):
        assert losses(folder, name) == losses(whole, name), name


def test_it_starts_when_an_interrupted_run_finds_a_plateau(shards: Path) -> None:
    """The run stops in the middle of the second window of three steps."""
    plateau = "discriminator.start=null", "discriminator.plateau_window=3"
    more = (*plateau, "discriminator.plateau_gain=0.9", "train.steps=9")
    one, halves = shards / "plateau", shards / "plateau-halves"
    assert train_here(options(shards, one, *more, task=TINY_GAN)) == 0
    assert train_here(options(shards, halves, *more, "train.steps=5", task=TINY_GAN)) == 0
    assert train_here(options(shards, halves, *more, "resume=force", task=TINY_GAN)) == 0
    critic = losses(one, "critic")
    assert min(critic) == 7 and losses(halves, "critic") == critic
    assert losses(halves) == losses(one)


def test_two_ranks_play_the_same_game(shards: Path, whole: Path) -> None:
    folder = shards / "two"
    run_ranks(2, train_on_rank, options(shards, folder, task=TINY_GAN))
    for name in ("loss", "critic", "adversarial", "adaptive_weight"):
        one, two = losses(whole, name), losses(folder, name)
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("strategy", ["fsdp2", *(f"deepspeed_zero{stage}" for stage in range(4))])
def test_every_strategy_plays_the_same_game(shards: Path, whole: Path, strategy: str) -> None:
    folder = shards / strategy
    short = ("train.steps=6", "train.checkpoint_every=0", f"engine={strategy}")
    run_ranks(2, train_on_rank, options(shards, folder, *short, task=TINY_GAN))
    for name in ("loss", "critic", "adversarial"):
        one, other = losses(whole, name), losses(folder, name)
        assert other == pytest.approx({s: one[s] for s in one if s <= 6}, rel=1e-3, abs=1e-5), name


def play(adversary: Adversary, values: list[float]) -> int | None:
    for step, value in enumerate(values):
        adversary.watch(torch.tensor(value))
        adversary.finish_step(step, 1.0)
    return adversary.figures.started


def test_it_starts_when_reconstruction_stands_still(shards: Path) -> None:
    plateau: tuple[Any, ...] = ("discriminator.start=null", "discriminator.plateau_window=3")
    config = config_of(shards, *plateau)
    falling = [1.0 * 0.9**step for step in range(12)]
    assert play(Adversary(config, single_process()), falling) is None
    assert play(Adversary(config, single_process()), [*falling[:6], *[falling[5]] * 6]) == 12


def test_a_term_that_begins_is_no_plateau(shards: Path) -> None:
    plateau: tuple[Any, ...] = ("discriminator.start=null", "discriminator.plateau_window=3")
    config = config_of(shards, *plateau, "loss.flicker={weight: 1.0, start: 6}")
    falling = [1.0 * 0.9**step for step in range(18)]
    with_term = [value + (step >= 6) for step, value in enumerate(falling)]
    assert play(Adversary(config_of(shards, *plateau), single_process()), with_term[:9]) == 9
    assert play(Adversary(config, single_process()), with_term[:12]) is None
    assert play(Adversary(config, single_process()), [*with_term[:9], *[with_term[8]] * 6]) == 15


def test_a_lesson_that_is_not_finite_leaves_its_samples_out(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Adversary.lesson

    def lesson(self: Adversary, *clips: Any) -> LossSum:
        found = honest(self, *clips)
        bad = self.figures.lessons == 1 and not (shards / "critic" / "quarantine.jsonl").exists()
        return LossSum(found.total * math.nan, found.parts) if bad else found

    monkeypatch.setattr(Adversary, "lesson", lesson)
    more = "data.max_bad_fraction=0.9"
    assert train_here(options(shards, shards / "critic", more, task=TINY_GAN)) == 0
    lines = (shards / "critic" / "quarantine.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows and all("of the discriminator not finite at step 4" in r["reason"] for r in rows)
    norms = losses(shards / "critic", "critic_grad_norm")
    assert norms[4] is None and all(norms[step] for step in norms if step != 4)


def test_figures_come_back(shards: Path) -> None:
    config = config_of(shards)
    one, two = (Adversary(config, single_process()) for _ in range(2))
    one.figures.windows, one.figures.real, one.figures.lessons = [0.5, 0.4], 0.7, 3
    two.load(one.state())
    assert two.figures == one.figures


def test_charging_leaves_no_gradient_and_is_clamped(shards: Path) -> None:
    adversary = Adversary(config_of(shards), single_process())
    pixels = torch.randn(2, 3, 5, 16, 16)
    weights = torch.ones(2)
    slope = torch.randn_like(pixels)
    away, parts = adversary.charge(pixels, weights, slope)
    assert all(p.grad is None for p in adversary.engine.module.parameters())
    adaptive = parts["adaptive_weight"].item() / 2
    if adaptive < 10:
        assert away.norm().item() == pytest.approx(0.5 * slope.norm().item(), rel=1e-4)
    _, louder = adversary.charge(pixels, weights, 1e6 * slope)
    assert louder["adaptive_weight"].item() / 2 == 10


def test_r1_kinds_agree_on_what_is_steep(shards: Path) -> None:
    """Both are quadratic in the slope, whatever the logits themselves are."""
    config = config_of(shards, "discriminator.r1_kind=exact")
    exact = Adversary(config, single_process())
    samples = Plan.from_config(config.data, config.seed).step(0)[0].samples
    video = torch.rand(len(samples), 3, 5, 16, 16) * 2 - 1
    ones = torch.ones(len(video))
    steep, penalty = [], []
    for scale in (1.0, 10.0):
        with torch.no_grad():
            exact.engine.module.get_parameter("conv_out.weight").mul_(scale)
        for kind, found in (("exact", penalty), ("finite_difference", steep)):
            exact.settings = replace(exact.settings, r1_kind=kind)
            found.append(exact.lesson(video, video, ones, samples).parts["r1"].item())
    assert penalty[1] == pytest.approx(100 * penalty[0], rel=1e-3)
    assert steep[1] == pytest.approx(100 * steep[0], rel=1e-3)
    with pytest.raises(ValueError, match="needs double backward"):
        config_of(shards, "discriminator.r1_kind=exact", "engine=deepspeed_zero1")
