"""Trainings on the whole road, from shards to a score card: what the tiers of proof share."""

import math
from collections.abc import Sequence
from pathlib import Path

from longtake.data.world import Shapes, write_world
from longtake.train.card import Card, Score
from longtake.train.evaluate import EvaluateOptions, evaluate_run
from longtake.train.run_folder import read_marker
from tests.train.tiny_runs import kill_or_leave, start_command

TORCHRUN = "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "longtake.train"
NANO = Shapes(sizes=((16, 16),), frames=(8,))


# To learn more than a colour: twice nano's batch, for Muon's part of a step has one price.
LONGER = (
    "data.buckets=[{frames: 8, height: 16, width: 16, batch_size: 16}]",
    *("optim.lr=1.5e-3", "optim.warmup_steps=100", "ema.decay=0.998"),
    *("samples.guidance_scale=2.0", "train.val_every=1000", "train.checkpoint_every=1000"),
    "timesteps.shift=20",  # which word belongs to which is learned where nearly all is noise,
)
SHAPES = "curriculum=[{step: 1500, shift: 20}, {step: 2500, shift: 5}]"  # and shape in less


def write_shards(out: Path, families: Sequence[str], num_clips: int, num_val: int) -> None:
    """Shards of nano clips, train and val."""
    for split, count in (("train", num_clips), ("val", num_val)):
        write_world(
            out / split,
            families=families,
            num_clips=count,
            split=split,
            shapes=NANO,
            num_workers=2,
            progress=False,
        )


def nano_command(shards: Path, run: Path, *more: str) -> list[str]:
    """Overrides of the nano run on these shards."""
    return [
        *("experiment=nano_identity", f"output_dir={run}"),
        *(f"data.train.0.path={shards}/train", f"data.val.0.path={shards}/val"),
        *("train.sample_every=0", "train.num_threads=1", "train.device=cpu", *more),
    ]


def train_to_the_end(command: Sequence[str], run: Path, seconds: float) -> None:
    """Two gloo ranks; fails with their output unless the run finishes in time."""
    process = start_command(command, *TORCHRUN, cwd=run.parent)
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        kill_or_leave(process)
    assert process.returncode == 0, output
    assert read_marker(run) == "FINISHED"


def card_of(
    run: Path,
    num_prompts: int,
    num_pairs: int = 0,
    tasks: tuple[str, ...] = ("t2v",),
    captions: str | None = None,
) -> Card:
    """Scores of the EMA weights on prompts of the split val."""
    options = EvaluateOptions(
        splits=("val",),
        tasks=tasks,
        caption_kind=captions,
        weights=("ema",),
        num_prompts=num_prompts,
        num_pairs=num_pairs,
        num_shown=0,
    )
    return evaluate_run(run, options).card


def score_of(card: Card, family: str, name: str, task: str = "t2v") -> Score:
    return next(s for s in card.scores if (s.task, s.family, s.name) == (task, family, name))


def mean_of(card: Card, name: str, task: str = "t2v") -> float:
    """A score over all families that have it, every clip counting alike."""
    rows = [score for score in card.scores if (score.task, score.name) == (task, name)]
    return math.fsum(s.score * s.num_clips for s in rows) / sum(s.num_clips for s in rows)
