"""Shards for a module, and the small road, built once: pixel shards, a VAE, latents, a DiT."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from longtake.launch.compose import compose_dit
from longtake.train.encode import encode_shards
from longtake.train.encode_plan import EncodeOptions

from .small_runs import DIT_SIZES, write_dit_run, write_vae_run, write_world
from .tiny_runs import write_splits


@dataclass(frozen=True)
class Road:
    """Folders of a whole, tiny road."""

    pixels: Path
    val: Path
    vae: Path
    latents: Path
    dit: Path


def small_text() -> EncodeOptions:
    return EncodeOptions(compose_dit(["stage=dit", *DIT_SIZES]).text, batch_size=4, device="cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pixel shards of a few clips, `train` and `val`, made for each module that asks."""
    return write_splits(tmp_path_factory.mktemp("shards"), 16, 4)


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Road:
    root = tmp_path_factory.mktemp("road")
    pixels = write_world(root / "world" / "train")
    val = write_world(root / "world" / "val", split="val", num_clips=8)
    vae = write_vae_run(root / "vae", pixels)
    encode_shards(vae, pixels, root / "latents", small_text())
    dit = write_dit_run(root / "dit", root / "latents")
    return Road(pixels, val, vae, root / "latents", dit)
