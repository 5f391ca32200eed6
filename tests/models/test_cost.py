"""The presets: how many weights they have, and what a forward pass costs."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import longtake.conf
from longtake.models.cost import forward_flops, vae_forward_flops
from longtake.models.dit import DiT, DiTConfig
from tests.models.small_vaes import CONFIGS, make_vae

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
    "wan_14b_i2v": 14_288_901_184,
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


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_vae_costs_what_is_counted_while_it_runs(name: str, length: int) -> None:
    vae = make_vae(CONFIGS[name])
    st, sh, sw = vae.strides
    shape = 1 + st * (length - 1), 3 * sh, 4 * sw
    with FlopCounterMode(display=False) as counter:
        video = torch.randn(2, vae.config.in_channels, *shape)
        pixels, _ = vae(video, torch.zeros(2, vae.config.z_dim, length, 3, 4))
        forward = counter.get_total_flops()
        pixels.sum().backward()
    assert forward == 2 * vae_forward_flops(vae.config, *shape) > 0
    if length > 1:  # a frame alone sends no gradient to what weighs the frames before
        assert counter.get_total_flops() == pytest.approx(3 * forward, rel=0.2)


def test_a_vae_refuses_to_count_what_it_cannot_take() -> None:
    with pytest.raises(ValueError, match="frames"):
        vae_forward_flops(CONFIGS["4x4x4"], 2, 16, 16)
