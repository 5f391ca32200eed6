"""data.pack=true: samples of every size in one micro-batch, each with the loss it has alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longtake.data.catalogue import build_catalogue
from longtake.data.decode import encode_video
from longtake.data.loader import Batch, Loader
from longtake.data.plan import Plan
from longtake.data.shards import ShardWriter
from longtake.data.world import make_clip
from longtake.train.codec import Codec
from longtake.train.config import parse_config
from longtake.train.dit_task import DiTTask
from longtake.train.engine import Engine, single_process
from longtake.train.schema import DiTRun
from tests.train.forked import import_before_fork, run_ranks
from tests.train.tiny_runs import TINY_VAE, losses, options, train_here, train_on_rank, tree

SIZES = (5, 16, 16), (5, 16, 32), (3, 32, 16), (1, 16, 16)
BUCKETS = ",".join(f"{{frames:{t},height:{h},width:{w}}}" for t, h, w in SIZES)
PACKS = (
    *("data.pack=true", f"data.buckets=[{BUCKETS}]", "data.cost.token=[1,4,4]"),
    *("data.cost.max_tokens=480", "engine.precision=fp32", "train.val_every=6", "train.steps=6"),
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of clips of every size, `train` and `val`."""
    root = tmp_path_factory.mktemp("mixed")
    for split, count in (("train", 32), ("val", 8)):
        with ShardWriter(root / split, max_samples=8) as writer:
            for index in range(count):
                frames, height, width = SIZES[index % len(SIZES)]
                clip = make_clip(
                    *(0, split, index), families=["move"], frames=5, height=height, width=width
                )
                meta = json.dumps({"captions": clip.captions, "fps": 8, "split": split}).encode()
                members = {"mp4": encode_video(clip.frames[:frames], 8), "json": meta}
                writer.write(clip.key, members)
        build_catalogue(root / split, dataset=f"mixed-{split}", num_workers=1, progress=False)
    return root


def pack_task(mixed: Path, *more: str) -> tuple[DiTTask, Engine]:
    config = parse_config(tree(options(mixed, mixed / "run", *PACKS, *more)))
    assert isinstance(config, DiTRun)
    torch.manual_seed(0)
    codec = Codec(3, (1, 1, 1), torch.tensor(0.0), torch.tensor(1.0))
    task = DiTTask(config, torch.device("cpu"), codec)
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return task, Engine(task.module, config.optim, config.engine, single_process())


@pytest.mark.parametrize("padded", [False, True])
def test_a_pack_is_its_samples_one_by_one(mixed: Path, padded: bool) -> None:
    """Losses and gradients, with samples given nothing, something in place, or noisy frames."""
    task, engine = pack_task(
        mixed,
        *("tasks={t2v: 1, t2i: 1, i2v: 1, join: 1, random_frames: 1}", "given.noise=0.3"),
        *("timesteps.base_tokens=80", "loss.weighting=sample"),
    )
    assert task.budget is None
    task.budget = 480 if padded else None  # as where its blocks are compiled
    plan = Plan.from_config(task.config.data, task.config.seed)
    batches = next(iter(Loader(plan, range(4))))
    assert all(len({sample.shape for sample in batch.samples}) > 1 for batch in batches)
    assert all(task.tokens(batch) <= 480 for batch in batches)

    def gradients(parts: list[Batch]) -> tuple[float, list[torch.Tensor]]:
        task.module.zero_grad()
        total = torch.stack([task.loss(engine, part).total for part in parts]).sum()
        total.backward()
        return total.item(), [p.grad for p in task.module.parameters() if p.grad is not None]

    loss, found = gradients(batches)
    task.budget = None
    alone = [replace(batch, clips=[clip]) for batch in batches for clip in batch.clips]
    expected, wanted = gradients(alone)
    assert loss == pytest.approx(expected, rel=1e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.dist
def test_two_ranks_learn_from_packs_what_one_does(mixed: Path, tmp_path: Path) -> None:
    import_before_fork()
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert train_here(options(mixed, alone, *PACKS)) == 0
    assert run_ranks(2, train_on_rank, options(mixed, both, *PACKS)) == [0, 0]
    assert losses(both) == pytest.approx(losses(alone), rel=1e-5)
    last = losses(both, "val/loss/5x16x32")
    assert last == pytest.approx(losses(alone, "val/loss/5x16x32"), rel=1e-5) and 6 in last


def test_what_cannot_be_packed_is_said(
    mixed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train_here(options(mixed, tmp_path, *PACKS, "data.cost.token=[4,16,16]")) == 1
    assert "data.cost.token=[4, 16, 16] must be [1, 4, 4]" in capfd.readouterr().err
    assert train_here(options(mixed, tmp_path, *PACKS, task=TINY_VAE)) == 1
    assert "data.pack=true holds for stage=dit only" in capfd.readouterr().err
