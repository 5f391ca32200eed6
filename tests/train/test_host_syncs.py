"""Nobody waits for the device: a step's norm is read when the next one is under way."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longtake.models.dit import DiT, DiTConfig
from longtake.models.transfer import HostCopy, to_device
from longtake.train.dit_task import DiTTask
from longtake.train.engine import Engine, EngineConfig, Ranks, single_process
from longtake.train.trainer import Training
from longtake.train.vae_task import VAETask
from tests.train import tiny
from tests.train.forked import import_before_fork, run_ranks
from tests.train.tiny_runs import TINY_GAN, losses, options, train_on_rank, write_splits

SIZES = DiTConfig(
    *(4, 4), hidden_size=64, num_heads=2, depth=2, ffn_dim=64, text_dim=16, patch_size=(1, 2, 2)
)


def spied(ranks: Ranks, overrides: list[str]) -> list[str]:
    """What a run does, in order."""
    events: list[str] = []

    def spy(owner: type, method: str, name: str) -> None:
        honest = getattr(owner, method)

        def told(*args: object, **kwargs: object) -> object:
            events.append(name)
            return honest(*args, **kwargs)

        patch.setattr(owner, method, told)

    with pytest.MonkeyPatch.context() as patch:
        spy(DiTTask, "loss", "loss")
        spy(VAETask, "loss", "loss")
        spy(Engine, "__call__", "forward")
        spy(Engine, "backward", "backward")
        spy(Engine, "clip_and_step", "step")
        spy(HostCopy, "read", "read")
        assert train_on_rank(ranks, overrides) == 0
    return events


def train_eagerly(ranks: Ranks, overrides: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "pauses_at", lambda run, step: True)
        return train_on_rank(ranks, overrides)


@pytest.mark.dist
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_norm_is_read_while_the_next_step_is_under_way(tmp_path: Path, engine: str) -> None:
    """After its first forward and before its backward, unless a row, a checkpoint or the like is
    due between them; and the run is the one that reads each norm at once."""
    import_before_fork()
    write_splits(tmp_path, 24, 4)
    more = "train.steps=7", "train.log_every=3", f"engine={engine}", "train.val_every=0"
    more = (*more, "train.checkpoint_every=5", "data.micro_batches_per_step=2")
    (events,) = run_ranks(1, spied, options(tmp_path, tmp_path / "run", *more))
    steps = " ".join(events).split("step")
    late = "loss forward read backward loss forward backward"
    soon = "loss forward backward loss forward backward"
    assert [each.strip() for each in steps] == [
        *(soon, late, late),
        f"read {soon}",  # a row at 3
        late,
        f"read {soon}",  # a checkpoint at 5
        *(f"read {soon}", "read"),  # a row at 6, and the end
    ]
    assert run_ranks(1, train_eagerly, options(tmp_path, tmp_path / "eager", *more)) == [0]
    assert losses(tmp_path / "eager") == losses(tmp_path / "run")


@pytest.mark.dist
def test_a_lesson_is_looked_at_while_the_next_step_is_under_way(tmp_path: Path) -> None:
    """The discriminator's norm and its verdicts, after the VAE's next forward; the VAE's norm and,
    for train.loss_jump, its losses after the discriminator's."""
    import_before_fork()
    write_splits(tmp_path, 24, 4)
    more = "train.steps=6", "train.log_every=6", "train.val_every=0", "train.checkpoint_every=0"
    more = (*more, "data.micro_batches_per_step=1")
    run = options(tmp_path, tmp_path / "run", *more, task=TINY_GAN)
    (events,) = run_ranks(1, spied, run)
    *_, last, _ = " ".join(events).split("step step")
    assert last.strip() == "loss forward read read forward read read backward backward"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
@pytest.mark.parametrize("muon", [[], ["blocks.*"]])
def test_a_step_on_a_gpu_syncs_nothing(muon: list[str]) -> None:
    config = EngineConfig("ddp", 0, "bf16", "none")
    optim = replace(tiny.OPTIM, muon=muon)
    ranks = single_process(torch.device("cuda"))
    engine = Engine(DiT(SIZES), optim, config, ranks)
    results = []

    def step() -> None:
        latents, t, text = (
            to_device(x, ranks.device)
            for x in (torch.randn(2, 4, 3, 8, 8), torch.rand(2), torch.randn(2, 5, 16))
        )
        loss = engine(latents, t, text).square().sum()
        engine.backward(loss, last=True)
        results.append(engine.strategy.clip_and_step(1e-3, 1.0))

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(result.grad_norm > 0 and not result.skipped for result in results)
