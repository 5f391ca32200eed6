"""Load what a run learned: its config and its modules, from a run folder or one checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from longtake.models.dit import DiT
from longtake.models.numbers import NumberTokens
from longtake.models.text import TextEncoder
from longtake.models.vae import VAE
from longtake.train import checkpoint
from longtake.train.config import parse_config
from longtake.train.lora import merge_adapters
from longtake.train.run_folder import CHECKPOINTS
from longtake.train.schema import DiTRun, VAERun
from longtake.train.snapshot import CONFIG

M = TypeVar("M", bound=nn.Module)
WEIGHTS = {"ema": "ema", "raw": "param"}  # what the user says → the checkpoint's kind


@dataclass(frozen=True)
class RunPlace:
    """A run on disk: its folder, the checkpoint to read, the step it was written at."""

    folder: Path
    checkpoint: Path
    step: int


@dataclass(frozen=True)
class LoadedVAE:
    """A VAE in evaluation mode, with the run it came from."""

    place: RunPlace
    config: VAERun
    weights: str  # ema | raw
    vae: VAE


@dataclass(frozen=True)
class LoadedDiT:
    """A DiT, its text encoder and its numbers in evaluation mode, with the run they came from."""

    place: RunPlace
    config: DiTRun
    weights: str  # ema | raw
    dit: DiT
    text: TextEncoder
    numbers: NumberTokens | None = None  # where they are told as embeddings


def find_run(path: Path) -> RunPlace:
    """`path` is a run folder (its last good checkpoint counts) or one checkpoint of it.

    ValueError when it is neither, or holds no checkpoint that verifies.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give a run folder or one of its checkpoints")
    chosen = path
    if not (path / checkpoint.MANIFEST).is_file():
        found = checkpoint.find_last_good(path / CHECKPOINTS)
        if found is None:
            raise ValueError(
                f"{path}: holds no checkpoint that verifies; give the output_dir of a run that "
                "has trained at least train.checkpoint_every steps"
            )
        chosen = found
    try:
        step = int(checkpoint.read_manifest(chosen)["step"])
    except checkpoint.CheckpointError as error:
        raise ValueError(f"{chosen}: {error}") from error
    chosen = chosen.resolve()
    inside = chosen.parent.name == CHECKPOINTS
    return RunPlace(chosen.parent.parent if inside else chosen.parent, chosen, step)


def read_run_config(place: RunPlace) -> VAERun | DiTRun:
    """The config the checkpoint was written with."""
    text = (place.checkpoint / CONFIG).read_text(encoding="utf-8")
    return parse_config(json.loads(text))


def read_tensors(place: RunPlace, weights: str = "ema") -> dict[str, Tensor]:
    """The EMA or raw weights of a checkpoint as they are in it; ValueError when damaged."""
    if weights not in WEIGHTS:
        raise ValueError(f"--weights {weights} must be one of {', '.join(WEIGHTS)}")
    try:
        return checkpoint.load_full(place.checkpoint, WEIGHTS[weights])
    except checkpoint.CheckpointError as error:
        raise ValueError(str(error)) from error


def read_weights(
    place: RunPlace, config: VAERun | DiTRun, weights: str = "ema"
) -> dict[str, Tensor]:
    """The EMA or raw weights of a plain model: adapters are merged. Errors as `read_tensors`."""
    tensors = read_tensors(place, weights)
    if isinstance(config, DiTRun) and config.lora is not None:
        return merge_adapters(tensors, config.lora)
    return tensors


def load_run(
    path: Path, weights: str = "ema", device: torch.device | str = "cpu"
) -> LoadedVAE | LoadedDiT:
    """Config and modules of a run with its EMA or raw weights, fp32, ready for inference.

    ValueError for a place without a good checkpoint, or one that does not fit its own config.
    """
    place = find_run(path)
    config = read_run_config(place)
    tensors = read_weights(place, config, weights)
    if isinstance(config, VAERun):
        vae = _fill(VAE(config.vae), tensors, "", place, device)
        return LoadedVAE(place, config, weights, vae)
    dit = _fill(DiT(config.model), tensors, "dit.", place, device)
    text = TextEncoder(config.text)
    if not config.text.is_trained:  # frozen: it is where it came from, not in the checkpoint
        text = text.eval().requires_grad_(False).to(device)
    else:
        text = _fill(text, tensors, "text.", place, device)
    numbers = None
    if sources := config.numbers.embedded:
        numbers = NumberTokens(sources, config.model.text_dim)
        numbers = _fill(numbers, tensors, "numbers.", place, device)
    return LoadedDiT(place, config, weights, dit, text, numbers)


def load_vae(path: Path, weights: str = "ema", device: torch.device | str = "cpu") -> LoadedVAE:
    """`load_run` for a place where only a VAE will do."""
    run = load_run(path, weights, device)
    if not isinstance(run, LoadedVAE):
        raise ValueError(f"{path}: stage={run.config.stage} must be vae; give the folder of a VAE")
    return run


def load_dit(path: Path, weights: str = "ema", device: torch.device | str = "cpu") -> LoadedDiT:
    """`load_run` for a place where only a DiT will do."""
    run = load_run(path, weights, device)
    if not isinstance(run, LoadedDiT):
        raise ValueError(f"{path}: stage={run.config.stage} must be dit; give the folder of a DiT")
    return run


def _fill(
    module: M, tensors: dict[str, Tensor], prefix: str, place: RunPlace, device: torch.device | str
) -> M:
    """Put the tensors under `prefix` into the module; ValueError when names or shapes differ."""
    mine = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    try:
        module.load_state_dict(mine)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{place.checkpoint}: does not fit its own config, so it was written by another "
            f"version of longtake: {first}"
        ) from error
    return module.eval().requires_grad_(False).to(device)


def pick_device(name: str) -> torch.device:
    """auto (CUDA when there is one) | cpu | cuda; ValueError when CUDA is asked for in vain."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch finds no CUDA device here; use cpu or auto")
    return torch.device(name)
