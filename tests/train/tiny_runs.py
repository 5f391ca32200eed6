"""Trainings of a few seconds on world shards: in this process, on forked ranks, or as a command."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module

from longtake.data.catalogue import build_catalogue
from longtake.data.decode import encode_video
from longtake.data.shards import ShardWriter
from longtake.data.world import make_clip
from longtake.train.main import run
from longtake.train.ranks import Ranks
from longtake.train.tracking import read_metrics

FRAMES, SIZE = 5, 16
TINY_DIT = (
    *("experiment=nano_identity", "model.hidden_size=24", "model.num_heads=2", "model.depth=1"),
    *("model.ffn_dim=32", "model.patch_size=[1,4,4]", "text.num_layers=1", "text.d_model=16"),
    *("model.text_dim=16", "text.num_heads=2", "text.d_ff=16", "samples.steps=2"),
    "optim.muon=[]",  # for the strategies that shard
)
TINY_VAE = ("experiment=demo_vae", "vae.base_dim=8", "vae.z_dim=4", "tracking=jsonl")
SHORT = (
    f"data.buckets=[{{frames:{FRAMES},height:{SIZE},width:{SIZE},batch_size:2}}]",
    *("data.micro_batches_per_step=4", "train.steps=12", "train.log_every=1", "train.val_every=0"),
    *("train.sample_every=0", "train.checkpoint_every=4", "train.num_threads=1"),
    *("validation.num_samples=6", "validation.num_videos=3", "validation.noise_levels=[0.3,0.8]"),
    *("optim.warmup_steps=2", "train.device=cpu"),
)
TINY_GAN = (
    *TINY_VAE,
    *("loss.adversarial.weight=0.5", "discriminator.base_dim=8", "discriminator.num_layers=2"),
    *("discriminator.start=2", "discriminator.head_start=2", "discriminator.lr=1e-3"),
    *("discriminator.r1=1.0", "discriminator.lecam=0.1", "engine.precision=fp32"),
    "optim.schedule=constant",  # a shorter run is then the beginning of a longer one
)


def write_clips(folder: Path, num_clips: int, split: str = "train") -> Path:
    """World shards of 8 clips each, with a catalogue."""
    with ShardWriter(folder, max_samples=8) as writer:
        for index in range(num_clips):
            clip = make_clip(
                0, split, index, families=["move"], frames=FRAMES, height=SIZE, width=SIZE, fps=8
            )
            meta = json.dumps({"captions": clip.captions, "fps": 8, "split": split}).encode()
            writer.write(clip.key, {"mp4": encode_video(clip.frames, 8), "json": meta})
    build_catalogue(folder, dataset=f"tiny-{split}", num_workers=1, progress=False)
    return folder


def write_splits(root: Path, num_train: int, num_val: int) -> Path:
    """`train` and `val` of so many clips, for `options`."""
    write_clips(root / "train", num_train)
    write_clips(root / "val", num_val, "val")
    return root


def options(shards: Path, folder: Path, *more: str, task: Sequence[str] = TINY_DIT) -> list[str]:
    """Overrides of a tiny run on `shards`/train and `shards`/val into `folder`."""
    data = f"data.train.0.path={shards}/train", f"data.val.0.path={shards}/val"
    return [*task, *SHORT, *data, f"output_dir={folder}", *more]


def tree(overrides: Sequence[str]) -> Any:
    """The composed config, unchecked."""
    with initialize_config_module("longtake.conf", version_base="1.3"):
        return compose("config", overrides=list(overrides))


def train_here(overrides: Sequence[str]) -> int:
    """Exit code of a run in this process."""
    return run(tree(overrides))


def train_on_rank(ranks: Ranks, overrides: list[str]) -> int:
    """The same on a forked rank, see `forked.run_ranks`."""
    assert ranks.world_size == int(os.environ["WORLD_SIZE"])
    return run(tree(overrides))


def losses(folder: Path, name: str = "loss") -> dict[int, float]:
    """Values of a metric by step, those of the last attempt."""
    rows = read_metrics(folder / "metrics.jsonl")
    return {row["step"]: row[name] for row in rows if name in row}


def start_command(overrides: Sequence[str], *launcher: str, cwd: Path) -> subprocess.Popen[str]:
    """`python -m longtake.train` (or under `launcher`) in a process group of its own."""
    command = [sys.executable, "-m", *(launcher or ("longtake.train",)), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        env=environment,
        cwd=cwd,
        stdout=pipe,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_group(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    """Send a signal to a started command and all its children."""
    os.killpg(process.pid, number)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float) -> None:
    """Until `condition` holds; fails when the process ends before, or the time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            kill_or_leave(process)
            output = process.stdout.read() if process.stdout else ""
            raise AssertionError(
                f"ended or took {seconds} s too early (rc {process.returncode}):\n{output}"
            )
        time.sleep(0.005)


def kill_or_leave(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        kill_group(process)
        process.wait()
