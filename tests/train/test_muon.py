"""Orthogonal steps: what they are, which matrices take them, and that runs go on with them."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

from longtake.train import muon
from longtake.train.config import parse_config
from longtake.train.engine import Engine, EngineConfig, single_process
from longtake.train.muon import MOMENTUM, RMS, MuonAdamW, orthogonal
from longtake.train.optim import build_adamw, create_state, muon_groups
from longtake.train.ranks import Ranks
from tests.train.forked import run_ranks
from tests.train.tiny import OPTIM, Tiny
from tests.train.tiny_runs import losses, options, train_here, train_on_rank, tree

MUON = 'optim.muon=["dit.blocks.*"]', "optim.schedule=constant", "engine.precision=fp32"


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_singular_values_become_about_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonal(1e3 * matrix)
    assert torch.allclose(found, orthogonal(matrix), atol=1e-5)
    spectrum = torch.linalg.svdvals(found)[values > 0.05 * values[0]]
    assert spectrum.min() > 0.6 and spectrum.max() < 1.3
    inside = left.T @ found @ right.T  # the same singular vectors
    assert (inside - inside.diag().diag()).abs().max() < 1e-4


def test_kernels_turn_on_their_square_as_by_rounds_on_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(32, 864, generator=generator).double(), False)
    kernel = left * torch.logspace(0, -7, 32) @ right  # of hardly any rank
    whole = orthogonal(kernel)  # double takes the rounds on the whole
    assert torch.allclose(orthogonal(kernel.float()).double(), whole, atol=2e-4)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)


def test_steps_of_matrices_side_by_side_and_of_the_rest() -> None:
    torch.manual_seed(0)
    config = replace(OPTIM, muon=["qkv*"], muon_lr_scale=3.0, weight_decay=0.0)
    turned, plain = Layers(), Layers()
    plain.load_state_dict(turned.state_dict())
    before = turned.qkv.weight.detach().clone()
    for layers, used in ((turned, config), (plain, replace(config, muon=[]))):
        engine = Engine(layers, used, EngineConfig("ddp", 0, "fp32", "none"), single_process())
        generator = torch.Generator().manual_seed(1)
        for parameter in layers.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        engine.clip_and_step(lr=0.01, max_grad_norm=0.0)
    gradient = torch.randn(18, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(turned.head.weight, plain.head.weight)
    assert torch.equal(turned.qkv.bias, plain.qkv.bias)
    moved = before - turned.qkv.weight
    for part, source in zip(moved.chunk(3), gradient.chunk(3), strict=True):
        ahead = (1 - MOMENTUM) * source + MOMENTUM * (1 - MOMENTUM) * source
        expected = 0.01 * 3.0 * RMS * 6**0.5 * orthogonal(ahead)
        assert torch.allclose(part, expected, atol=1e-6)


def test_a_kernel_moves_as_the_matrix_of_its_rows() -> None:
    conv = nn.Conv2d(3, 4, 3, bias=False)
    before = conv.weight.detach().clone()
    conv.weight.grad = torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    optimizer = build_adamw(
        nn.Sequential(conv), replace(OPTIM, lr=0.01, muon=["*"], muon_lr_scale=1, weight_decay=0)
    )
    create_state(optimizer, conv.weight)
    optimizer.step()
    moved = (before - conv.weight).detach().flatten(1) / (0.01 * RMS * 27**0.5)
    values = torch.linalg.svdvals(moved)
    assert values.min() > 0.6 and values.max() < 1.3


def test_without_patterns_it_is_adamw() -> None:
    assert type(build_adamw(Tiny(), OPTIM)) is torch.optim.AdamW
    assert type(build_adamw(Tiny(), replace(OPTIM, muon=["first.*"]))) is MuonAdamW


def test_patterns_take_matrices_only() -> None:
    groups = muon_groups(Layers(), replace(OPTIM, muon=["*"]))
    found = {group["parts"]: [tuple(p.shape) for p in group["params"]] for group in groups}
    assert found == {3: [(18, 6)], 1: [(4, 6)]}
    with pytest.raises(ValueError, match=r"optim\.muon has norm\.\*"):
        muon_groups(Layers(), replace(OPTIM, muon=["norm.*"]))


def test_a_run_resumes_exactly_and_ranks_agree(shards: Path) -> None:
    whole, halves, two = (shards / name for name in ("whole", "halves", "two"))
    assert train_here(options(shards, whole, *MUON)) == 0
    assert train_here(options(shards, halves, *MUON, "train.steps=8")) == 0
    assert train_here(options(shards, halves, *MUON, "resume=force")) == 0
    assert losses(halves) == losses(whole)
    run_ranks(2, train_on_rank, options(shards, two, *MUON))
    assert losses(two) == pytest.approx(losses(whole), rel=1e-4)


def share_of_work(ranks: Ranks) -> tuple[list[bool], int]:
    """Whether each result is `orthogonal`'s own, and how many this rank worked out."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (16, 8), (8, 8), (4, 64), (8, 8), (24, 24), (8, 24)]
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    with patch.object(muon, "orthogonal", side_effect=orthogonal) as worked_out:
        found = muon.orthogonal_over(ranks, matrices)
    same = [
        torch.equal(one, orthogonal(matrix)) for one, matrix in zip(found, matrices, strict=True)
    ]
    return same, worked_out.call_count


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_divide_the_work_and_find_the_same(world_size: int) -> None:
    results = run_ranks(world_size, share_of_work)
    assert all(same == [True] * 7 for same, _ in results)
    counts = [count for _, count in results]
    assert sum(counts) == 7 and min(counts) >= 1
    assert share_of_work(single_process())[0] == [True] * 7


def test_sharding_strategies_refuse_it(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"optim\.muon=.* needs whole matrices"):
        parse_config(tree(options(shards, shards / "run", *MUON, "engine=deepspeed_zero2")))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    torch.manual_seed(0)
    layers = Layers()
    config = replace(OPTIM, muon=["qkv*"])
    engine = Engine(layers, config, EngineConfig("ddp", 0, "fp32", "none"), single_process())

    def state() -> list[torch.Tensor]:
        return [held.tensor.clone() for held in engine.owned_ranges()]

    def step(factor: float) -> bool:
        for parameter in layers.parameters():
            parameter.grad = torch.full_like(parameter, factor)
        return engine.clip_and_step(0.01, 0.5).skipped

    assert not step(1.0)
    before = state()
    assert step(float("nan")) and engine.optimizer_steps == 1
    assert all(torch.equal(old, new) for old, new in zip(before, state(), strict=True))
    assert not step(1.0) and engine.optimizer_steps == 2
