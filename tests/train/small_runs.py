"""World shards and finished runs of random weights, a second each: what tools start from."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from longtake.data.catalogue import build_catalogue
from longtake.data.decode import encode_image, encode_video
from longtake.data.shards import ShardWriter
from longtake.data.world import make_clip
from longtake.launch.compose import compose
from longtake.models.dit import DiT
from longtake.models.numbers import NumberTokens
from longtake.models.text import TextEncoder
from longtake.models.vae import VAE
from longtake.train import checkpoint
from longtake.train.config import to_tree, write_config
from longtake.train.ema import Ema
from longtake.train.engine import Engine, single_process
from longtake.train.lora import add_adapters
from longtake.train.run_folder import CHECKPOINTS, CONFIG, FINISHED, mark
from longtake.train.schema import DiTRun, VAERun
from longtake.train.text_to_video import TextToVideo
from tests.train.tiny_runs import SHORT, losses, train_here

FAMILIES = ("move", "leftright")
FRAMES, SIDE = 5, 16
BUCKET = f"{{frames:{FRAMES},height:{SIDE},width:{SIDE},batch_size:2}}"
COMMON = (
    *(f"data.buckets=[{BUCKET}]", "engine.precision=fp32", "tracking=jsonl"),
    *("train.steps=1", "train.device=cpu", "data.micro_batches_per_step=2"),
)
VAE_SIZES = ("vae.base_dim=8", "vae.z_dim=4", "vae.num_res_blocks=1")
DIT_SIZES = (
    *("model.in_channels=4", "model.out_channels=4", "model.hidden_size=24", "model.num_heads=2"),
    *("model.depth=2", "model.ffn_dim=48", "model.text_dim=16", "text.d_model=16"),
    *("text.num_layers=1", "text.num_heads=2", "text.d_ff=32", "samples.steps=3"),
)


def write_world(
    out: Path,
    *,
    split: str = "train",
    num_clips: int = 12,
    seed: int = 0,
    frames: int = FRAMES,
    width: int = SIDE,
    fps: float = 8,
) -> Path:
    """Catalogued shards of two families, by default 5 frames of 16×16, three clips a shard; one
    frame is an image."""
    with ShardWriter(out, max_samples=3) as writer:
        for index in range(num_clips):
            size = {"frames": frames, "height": SIDE, "width": width}
            clip = make_clip(seed, split, index, families=FAMILIES, fps=fps, **size)
            meta = {"json": json.dumps(clip.record()).encode()}
            if frames == 1:
                writer.write(clip.key, {"png": encode_image(clip.frames[0])} | meta)
            else:
                writer.write(clip.key, {"mp4": encode_video(clip.frames, fps)} | meta)
    build_catalogue(out, num_workers=1, progress=False)
    return out


def write_vae_run(folder: Path, pixels: Path, *overrides: str) -> Path:
    """A run folder of stage=vae with one checkpoint; EMA and raw weights differ."""
    config = compose(
        [
            *("stage=vae", "output_dir=" + str(folder), *COMMON, *VAE_SIZES),
            *(f"data.train.0.path={pixels}", f"data.val.0.path={pixels}", *overrides),
        ]
    )
    assert isinstance(config, VAERun)
    torch.manual_seed(0)
    return save_run(folder, VAE(config.vae), config)


def write_dit_run(folder: Path, latents: Path, *overrides: str) -> Path:
    """A run folder of stage=dit with one checkpoint; its head is not silent."""
    config = compose(
        [
            *("stage=dit", "output_dir=" + str(folder), *COMMON, *DIT_SIZES),
            *(f"data.train.0.path={latents}", f"data.val.0.path={latents}", *overrides),
        ]
    )
    assert isinstance(config, DiTRun)
    torch.manual_seed(1)
    dit, text, told = DiT(config.model), TextEncoder(config.text), config.numbers.embedded
    numbers = NumberTokens(told, config.model.text_dim) if told else None
    module = TextToVideo(dit, text, config.text.max_length, numbers)
    if config.lora is not None:
        add_adapters(module, config.lora)
    shake(module)  # a fresh DiT predicts zero: every comparison would hold
    return save_run(folder, module, config)


def four_steps(
    data: Path, folder: Path, frames: int, tasks: Sequence[str], *more: str
) -> list[str]:
    """Overrides of a run of four steps on clips of so many frames, all `tasks` drawn alike."""
    weights = {"i2v": 0} | dict.fromkeys(tasks, 1)
    bucket = f"{{frames:{frames},height:{SIDE},width:{SIDE},batch_size:2}}"
    return [
        *("stage=dit", *DIT_SIZES, *SHORT, f"data.buckets=[{bucket}]", f"output_dir={folder}"),
        *(f"data.train.0.path={data}", f"data.val.0.path={data}", "train.steps=4"),
        *("engine.precision=fp32", "tracking=jsonl", "samples.steps=2", "train.checkpoint_every=2"),
        *("validation.num_samples=2", "validation.num_videos=1", "validation.noise_levels=[0.5]"),
        f"tasks={{{', '.join(f'{name}: {weight}' for name, weight in weights.items())}}}",
        *more,
    ]


def train_and_resume(command: Callable[[Path], list[str]], folder: Path) -> Path:
    """A run of four steps that validates and draws; it has gone on from step 2 as it did before."""
    whole, again = folder / "whole", folder / "again"
    watched = "train.val_every=4", "train.sample_every=4", "train.keep_last=0"
    assert train_here([*command(whole), *watched]) == 0
    shutil.copytree(whole, again)
    shutil.rmtree(again / CHECKPOINTS / "step-00000004")
    assert train_here(command(again)) == 0
    rows = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["attempt"] == 2 and "loss" in row] == [3, 4]
    assert losses(again) == losses(whole)
    return whole


def save_run(folder: Path, module: torch.nn.Module, config: VAERun | DiTRun) -> Path:
    engine = Engine(module, config.optim, config.engine, single_process())
    ema = Ema(engine, config.ema)
    shake(module)
    state = {"step": 1, "samples_seen": 4, "exclusions": [], "plan": ""}
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, folder / CONFIG)
    checkpoint.save(folder / CHECKPOINTS, 1, engine, ema, state, to_tree(config))
    rows = [{"step": s, "attempt": 1, "loss": 1 / (s + 1), "lr": 1e-3} for s in range(3)]
    write_metrics(folder, rows)
    mark(folder, FINISHED, step=1)
    return folder


def write_metrics(folder: Path, rows: Sequence[dict[str, float]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


@torch.no_grad()
def shake(module: torch.nn.Module) -> None:
    """Add a little noise to every parameter."""
    for parameter in module.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
