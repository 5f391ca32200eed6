"""Weights that a new run starts from: another run's, or a public VAE's."""

from __future__ import annotations

import json
from pathlib import Path

from longtake.models.interop import vae_from_folder
from longtake.models.vae import VAE
from longtake.train.runs import load_vae


def start_from(vae: VAE, place: str) -> None:
    """Fill the VAE with the EMA weights of a run or checkpoint, or with a diffusers folder's.

    ValueError naming every key that is missing, unexpected or of another shape: half of a VAE is
    none.
    """
    path = Path(place)
    given = (vae_from_folder(path) if is_diffusers(path) else load_vae(path).vae).state_dict()
    mine = vae.state_dict()
    problems = [f"{name} is missing" for name in mine if name not in given]
    problems += [f"{name} is unexpected" for name in given if name not in mine]
    problems += [
        f"{name} is {tuple(given[name].shape)}, the config makes it {tuple(tensor.shape)}"
        for name, tensor in mine.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"init_from={place} does not fit vae.*:\n  {listed}")
    vae.load_state_dict(given)


def is_diffusers(path: Path) -> bool:
    """Whether the folder holds an `AutoencoderKLWan` as `save_pretrained` writes it."""
    config = path / "config.json"
    if not config.is_file() or (path / "manifest.json").is_file():
        return False
    return json.loads(config.read_text(encoding="utf-8")).get("_class_name") == "AutoencoderKLWan"
