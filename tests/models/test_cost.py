"""The presets: how many weights they have, and what a forward pass costs."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import longtake.conf
from longtake.models.cost import forward_flops
from longtake.models.dit import DiT, DiTConfig

# Parameters; those of public models are the sizes of their published weights.
PRESETS = {
    "demo": 1_226_912,
    "nano_identity": 1_243_360,
    "dit_s": 31_331_776,
    "dit_b": 121_645_888,
    "dit_l": 416_257_088,
    "wan_1_3b": 1_418_996_800,
    "wan_5b": 4_999_787_712,
    "wan_14b": 14_288_491_584,
}
GRID = (4, 8, 12)
ROWS, KEYS = 5, 16


def preset(name: str) -> DiTConfig:
    folder = Path(longtake.conf.__file__).parent / "model"
    return DiTConfig(**yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_presets_have_the_weights_and_cost_the_flops_they_say(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_autocast(*_: Any, **__: Any) -> Any:  # which meta tensors do not know
        return nullcontext()

    monkeypatch.setattr(torch, "autocast", no_autocast)
    config = preset(name)
    with torch.device("meta"):
        dit = DiT(config)
        latents = torch.empty(2, config.in_channels, *GRID)
        text, t = torch.empty(2, KEYS, config.text_dim), torch.empty(2)
    assert sum(parameter.numel() for parameter in dit.parameters()) == PRESETS[name]
    with FlopCounterMode(display=False) as counter:
        out = dit(latents, t, text, torch.tensor([ROWS - 1, 2]))
    assert out.shape == (2, config.out_channels, *GRID)
    tokens = torch.tensor(config.grid(GRID)).prod().item()
    found = forward_flops(config, int(tokens), text_rows=ROWS, text_keys=KEYS)
    assert counter.get_total_flops() == 2 * found


def test_every_preset_is_checked() -> None:
    folder = Path(longtake.conf.__file__).parent / "model"
    assert {path.stem for path in folder.glob("*.yaml")} == PRESETS.keys()
