"""Each term of the VAE's loss sees the fault it is there for."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtake.train.vae_losses import (
    Perceptual,
    absolute,
    charbonnier,
    chroma,
    detail,
    flicker,
    haar,
    squared,
)
from longtake.train.vae_schema import LossTerm
from tests.train.metric_weights import save_detector, save_perceptual


def pattern(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("term", [absolute, squared, charbonnier, detail, flicker, chroma])
def test_terms_are_per_clip_and_zero_for_the_truth(term) -> None:  # noqa: ANN001
    error = pattern(3, 3, 5, 12, 16)
    error[1] = 0
    values = term(error)
    assert values.shape == (3,) and values[1] == 0 and values[0] > 0
    assert torch.allclose(values[2:], term(error[2:]))


def test_charbonnier_is_l1_but_for_small_errors() -> None:
    assert charbonnier(torch.full((1, 3, 1, 4, 4), 0.5)).item() == pytest.approx(0.5, abs=2e-3)
    small = torch.full((1, 3, 1, 4, 4), 1e-5, requires_grad=True)
    charbonnier(small).backward()
    assert small.grad is not None and small.grad.sum() < 0.02  # L1's would be 1


def test_haar_keeps_the_energy() -> None:
    x = pattern(2, 3, 2, 8, 6)
    smooth, bands = haar(x)
    assert smooth.shape == (2, 3, 2, 4, 3) and bands.shape == (2, 3, 3, 2, 4, 3)
    energy = (2 * smooth).square().sum() + bands.square().sum()
    assert energy.item() == pytest.approx(x.square().sum().item(), rel=1e-5)
    assert haar(x[..., :7, :5])[0].shape == (2, 3, 2, 3, 2)


def test_detail_sees_edges_at_every_scale_and_no_shade() -> None:
    flat = torch.full((1, 3, 1, 16, 16), 0.3)
    assert detail(flat).item() == pytest.approx(0, abs=1e-7)
    for width in (1, 2, 4):
        stripes = (torch.arange(16) // width % 2 * 2.0 - 1).expand(1, 3, 1, 16, 16)
        assert detail(stripes) > 0.1
    assert detail(torch.ones(2, 3, 1, 1, 1)).tolist() == [0, 0]  # nothing to transform


def test_flicker_sees_change_and_no_constant_error() -> None:
    still = pattern(1, 3, 1, 4, 4).expand(-1, -1, 5, -1, -1)
    assert flicker(still).item() == 0
    swaying = torch.tensor([1.0, -1, 1]).view(1, 1, 3, 1, 1).expand(1, 3, 3, 4, 4)
    assert flicker(swaying).item() == 2
    assert flicker(pattern(2, 3, 1, 4, 4)).tolist() == [0, 0]


def test_chroma_sees_colour_and_no_light() -> None:
    assert chroma(torch.full((1, 3, 2, 4, 4), 0.5)).item() == pytest.approx(0, abs=1e-12)
    hue = torch.tensor([1.0, 0.0, -0.299 / 0.114]).view(1, 3, 1, 1, 1).expand(1, 3, 2, 4, 4)
    assert chroma(hue).item() == pytest.approx(squared(hue).item())  # it has no luma


def test_perceptual_by_a_file(tmp_path: Path) -> None:
    lpips = Perceptual(str(save_perceptual(tmp_path / "net.pt")), 2, "cpu")
    video = pattern(2, 3, 5, 8, 8).clamp(-1, 1)
    pixels = video.clone()
    pixels[1, :, 4] = 0
    pixels.requires_grad_()
    values = lpips(pixels, video)
    assert values.shape == (2,) and values[0] == 0 and values[1] > 0
    values.sum().backward()
    assert pixels.grad is not None and pixels.grad[1, :, 4].abs().sum() > 0
    assert pixels.grad[:, :, 1:4].abs().sum() == 0  # only the first and last frame were compared


def test_wrong_perceptual_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loss\.perceptual\.weights .*no such file"):
        Perceptual(str(tmp_path / "absent.pt"), 2, "cpu")
    (tmp_path / "text.pt").write_text("weights")
    with pytest.raises(ValueError, match="no TorchScript module"):
        Perceptual(str(tmp_path / "text.pt"), 2, "cpu")
    other = save_detector(tmp_path / "detector.pt")
    with pytest.raises(ValueError, match="its forward has no resize_images, return_lpips"):
        Perceptual(str(other), 2, "cpu")


def test_a_term_counts_from_its_start() -> None:
    term = LossTerm(0.5, 10)
    assert [term.at(step) for step in (0, 9, 10, 11)] == [0, 0, 0.5, 0.5]
