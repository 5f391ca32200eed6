"""The DiT against diffusers: outputs, gradients, text padding, noise levels per token."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longtake.models.dit import DiT, DiTConfig
from longtake.models.interop import (
    dit_from_diffusers,
    dit_from_pretrained,
    dit_state_from_diffusers,
    dit_to_diffusers,
)
from longtake.models.layers import patchify
from longtake.models.tokens import Video

PEERS = {
    "two heads": {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12,
        "in_channels": 4, "out_channels": 4, "text_dim": 10, "freq_dim": 16, "ffn_dim": 40,
        "num_layers": 2,
    },
    "no cross norm, other patch": {
        "patch_size": (2, 1, 3), "num_attention_heads": 3, "attention_head_dim": 10,
        "in_channels": 5, "out_channels": 3, "text_dim": 7, "freq_dim": 8, "ffn_dim": 30,
        "num_layers": 3, "cross_attn_norm": False,
    },
    "one head": {
        "patch_size": (1, 1, 1), "num_attention_heads": 1, "attention_head_dim": 32,
        "in_channels": 2, "out_channels": 2, "text_dim": 4, "freq_dim": 32, "ffn_dim": 16,
        "num_layers": 1, "eps": 1e-5,
    },
    "five heads, patches in every axis": {
        "patch_size": (3, 2, 2), "num_attention_heads": 5, "attention_head_dim": 6,
        "in_channels": 3, "out_channels": 3, "text_dim": 6, "freq_dim": 10, "ffn_dim": 50,
        "num_layers": 2,
    },
    "mask and image channels": {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 14,
        "in_channels": 12, "out_channels": 4, "text_dim": 9, "freq_dim": 16, "ffn_dim": 28,
        "num_layers": 2,
    },
    "four heads, wide rows": {
        "patch_size": (1, 1, 2), "num_attention_heads": 4, "attention_head_dim": 8,
        "in_channels": 2, "out_channels": None, "text_dim": 16, "freq_dim": 12, "ffn_dim": 20,
        "num_layers": 2, "eps": 1e-4,
    },
}  # fmt: skip
GRIDS = {  # latents (T, H, W), where others than (4, 6, 6)
    "one head": (3, 5, 7),
    "five heads, patches in every axis": (3, 10, 6),
    "mask and image channels": (5, 6, 10),
    "four heads, wide rows": (1, 7, 18),
}
TINY = DiTConfig(
    in_channels=4, out_channels=4, hidden_size=24, num_heads=2, depth=2, ffn_dim=48, text_dim=10
)


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        scale = 0.7 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.2
        parameter.data = start + noise * (0.3 if "scale_shift" in name else scale)


def peer(name: str) -> Any:
    module = WanTransformer3DModel(**PEERS[name])
    randomise(module)
    return module


def inputs(
    module: Any, grid: tuple[int, int, int] = (4, 6, 6), lens: tuple[int, ...] = (9, 9, 9)
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    config = module.config
    latents = torch.randn(3, config.in_channels, *grid, generator=generator)
    text = torch.randn(3, 9, config.text_dim, generator=generator)
    for row, used in zip(text, lens, strict=True):
        row[used:] = 0
    return latents, torch.tensor([0.0, 0.37, 1.0]), text


def compare(ours: DiT, theirs: Any, found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    scale = expected.numel() ** -0.5  # gradients of order one
    (scale * expected * weight).sum().backward()
    (scale * found * weight).sum().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    wanted = dit_state_from_diffusers(grads, ours)
    assert max(grad.abs().max() for grad in wanted.values()) > 0.1
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("name", PEERS)
def test_equals_diffusers(name: str) -> None:
    theirs = peer(name)
    ours = dit_from_diffusers(theirs)
    lens = (9, 2, 4)
    latents, t, text = inputs(theirs, GRIDS.get(name, (4, 6, 6)), lens)
    expected = theirs(latents, 1000 * t, text).sample
    compare(ours, theirs, ours(latents, t, text, torch.tensor(lens)), expected)


@pytest.mark.parametrize("lens", [(3, 1, 5), (8, 8, 1)])
def test_text_padding_equals_the_padded_peer(lens: tuple[int, ...]) -> None:
    theirs = peer("two heads")
    ours = dit_from_diffusers(theirs)
    latents, t, text = inputs(theirs, lens=lens)
    expected = theirs(latents, 1000 * t, text).sample
    compare(ours, theirs, ours(latents, t, text, torch.tensor(lens)), expected)


@pytest.mark.parametrize("name", ["two heads", "five heads, patches in every axis"])
def test_levels_equal_a_timestep_per_token(name: str) -> None:
    """The TI2V form of Wan 2.2, with three levels a sample where that needs two."""
    theirs = peer(name)
    ours = dit_from_diffusers(theirs)
    grid = GRIDS.get(name, (4, 6, 6))
    latents, t, text = inputs(theirs, grid)
    levels = torch.stack((t, torch.zeros(3), 0.1 + t / 2), dim=1)
    num_tokens = math.prod(ours.config.grid(grid))
    index = torch.randint(0, 3, (3, num_tokens), generator=torch.Generator().manual_seed(5))
    expected = theirs(latents, 1000 * levels.gather(1, index), text).sample
    found = ours(latents, None, text, levels=levels, level_index=index)
    compare(ours, theirs, found, expected)


@torch.no_grad()
def test_one_level_equals_plain_timesteps() -> None:
    ours = dit_from_diffusers(peer("two heads"))
    latents, t, text = inputs(peer("two heads"))
    index = torch.ones(3, 36, dtype=torch.int64)
    found = ours(latents, None, text, levels=torch.stack((0 * t, t), 1), level_index=index)
    torch.testing.assert_close(found, ours(latents, t, text), atol=1e-6, rtol=0)


@torch.no_grad()
def test_samples_do_not_depend_on_the_batch() -> None:
    ours = dit_from_diffusers(peer("two heads"))
    latents, t, text = inputs(peer("two heads"))
    together = ours(latents, t, text)
    for i in range(3):
        alone = ours(latents[i : i + 1], t[i : i + 1], text[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=0)


@torch.no_grad()
def test_round_trip_through_diffusers() -> None:
    ours = DiT(TINY)
    randomise(ours)
    theirs: Any = dit_to_diffusers(ours)
    back = dit_from_diffusers(theirs)
    assert back.config == TINY
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
    latents, t, text = inputs(theirs)
    torch.testing.assert_close(
        theirs(latents, 1000 * t, text).sample, ours(latents, t, text), atol=1e-5, rtol=0
    )


def test_bf16_autocast_is_close() -> None:
    ours = dit_from_diffusers(peer("two heads"))
    latents, t, text = inputs(peer("two heads"))
    exact = ours(latents, t, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(latents, t, text, torch.tensor([4, 4, 4]) + 5)
    assert found.dtype == torch.float32
    assert (found - exact).abs().mean() < 0.03 * exact.abs().mean()
    found.square().mean().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_fresh_model_predicts_zero_and_every_part_can_learn() -> None:
    torch.manual_seed(0)
    dit = DiT(TINY)
    optimizer = torch.optim.Adam(dit.parameters(), lr=1e-2)
    latents, text = torch.randn(2, 4, 2, 4, 4), torch.randn(2, 3, 10)
    t = torch.tensor([0.2, 0.8])
    assert dit(latents, t, text).abs().max() == 0
    before = {name: p.detach().clone() for name, p in dit.named_parameters()}
    for _ in range(4):
        (dit(latents, t, text) - latents).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in dit.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"hidden_size": 25}, "model.hidden_size=25 must be divisible by model.num_heads=2"),
        ({"num_heads": 12}, "at least 6"),
        ({"patch_size": (1, 0, 2)}, "model.patch_size"),
        ({"freq_dim": 3}, "model.freq_dim=3"),
        ({"depth": 0}, "model.depth=0"),
    ],
)
def test_wrong_configs_are_refused(change: dict, rule: str) -> None:
    base = {
        "in_channels": 4, "out_channels": 4, "hidden_size": 24, "num_heads": 2, "depth": 2,
        "ffn_dim": 48, "text_dim": 10,
    }  # fmt: skip
    with pytest.raises(ValueError, match=rule):
        DiTConfig(**{**base, **change})


def test_absolute_positions_tell_apart_what_is_alike() -> None:
    """Of equal tokens all have one answer without them, and each its own with them."""
    for amplitude in (0.0, 2.0):
        torch.manual_seed(0)
        dit = DiT(replace(TINY, absolute_positions=amplitude))
        randomise(dit)
        latents = torch.ones(1, 4, 3, 4, 6)
        answer = dit(latents, torch.ones(1), torch.zeros(1, 2, 10))
        alike = torch.pdist(patchify(answer, TINY.patch_size)[0]) < 1e-4
        assert not alike.any() if amplitude else alike.all()
    with pytest.raises(ValueError, match=r"absolute_positions=2\.0"):
        dit_to_diffusers(dit)


def test_wrong_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"divisible by model\.patch_size"):
        DiT(TINY)(torch.zeros(1, 4, 2, 5, 4), torch.zeros(1), torch.zeros(1, 2, 10))


@pytest.mark.parametrize("option", [{"image_dim": 8}, {"added_kv_proj_dim": 32}])
def test_image_cross_attention_is_refused_by_name(option: dict) -> None:
    module = WanTransformer3DModel(**PEERS["one head"], **option)
    ((key, value),) = option.items()
    with pytest.raises(ValueError, match=f"{key}={value}"):
        dit_from_diffusers(module)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.bfloat16, 2e-2), (torch.half, 3e-3), (torch.double, 1e-6)]
)
@torch.no_grad()
def test_weights_of_inference_have_any_dtype(dtype: torch.dtype, error: float) -> None:
    """Inputs too: a batch with a level per token, and a pack."""
    torch.manual_seed(0)
    dit = DiT(replace(TINY, absolute_positions=1.0))
    for parameter in dit.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    latents, embeds = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 5, 10)
    lens, levels, index = torch.tensor([3, 5]), torch.rand(2, 2), torch.arange(24).view(2, 12) % 2

    def draw(kind: torch.dtype) -> Tensor:
        x, text = latents.to(kind), embeds.to(kind)
        batch = dit(x, None, text, lens, levels=levels, level_index=index)
        videos = [Video(*one) for one in zip(x, index, strict=True)]
        pack = dit(videos, None, text, lens, levels=levels)
        return torch.stack((batch, torch.stack(pack)))

    expected = draw(torch.float32)
    dit.to(dtype)
    for kind in (torch.float32, dtype):
        found = draw(kind)
        assert found.dtype == torch.float32
        assert (found - expected).norm() < error * expected.norm()


def test_places_without_whole_weights_are_refused(tmp_path: Path) -> None:
    peer("two heads").save_pretrained(tmp_path / "pipeline" / "transformer")
    assert dit_from_pretrained(str(tmp_path / "pipeline")).config.num_heads == 2
    file = tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({"other": tensors.pop("proj_out.bias"), **tensors}, file)
    with pytest.raises(ValueError, match=r"proj_out\.bias is missing\n  other is unexpected"):
        dit_from_pretrained(str(tmp_path / "pipeline"))
    with pytest.raises(ValueError, match="no such folder, and no hub id"):
        dit_from_pretrained(str(tmp_path / "elsewhere"))
