"""Convolutions of the discriminator: in bf16 on a CPU they run by frames, and mean the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.models.discriminator import ClipConv3d, Discriminator, DiscriminatorConfig

# Channels, kernel, stride and clip of each of its kinds; more than 1024 positions of output.
KINDS = {
    "first": ((3, 32), (3, 4, 4), (1, 2, 2), (1, 3, 5, 80, 96)),
    "image": ((3, 32), (3, 4, 4), (1, 2, 2), (2, 3, 1, 80, 96)),
    "middle": ((16, 32), (3, 4, 4), (2, 2, 2), (1, 16, 5, 66, 130)),
    "one frame left": ((64, 64), (3, 4, 4), (2, 2, 2), (1, 64, 2, 64, 64)),
    "last": ((32, 1), (3, 3, 3), (1, 1, 1), (1, 32, 3, 40, 40)),
}


def derivatives(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The output, its gradients, and those of the input gradient's square: second derivatives."""
    outward = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    first = torch.autograd.grad((out.float() * outward).sum(), inputs, create_graph=True)
    slope = first[0].float().square().sum()
    return [out, *first, torch.autograd.grad(slope, inputs[1])[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_by_frames_equals_the_plain_convolution(kind: str, dtype: torch.dtype) -> None:
    channels, kernel, stride, shape = KINDS[kind]
    torch.manual_seed(0)
    conv = ClipConv3d(*channels, kernel, stride=stride, padding=1)
    assert conv.bias is not None
    video = torch.randn(shape, requires_grad=True)
    inputs = [video, conv.weight, conv.bias]
    expected = derivatives(F.conv3d(video, conv.weight, conv.bias, stride, 1), inputs)
    is_half = dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        found = conv(video) if is_half else conv.by_frames(video)
    assert found.dtype == dtype
    for exact, other in zip(expected, derivatives(found, inputs), strict=True):
        error = (other.float() - exact).norm()
        assert error < (0.01 if is_half else 1e-5) * exact.norm()


@pytest.mark.parametrize("frames", [1, 5])
def test_bf16_of_large_frames_teaches_what_fp32_does(frames: int) -> None:
    torch.manual_seed(0)
    critic = Discriminator(DiscriminatorConfig(32, 2))
    video = torch.randn(1, 3, frames, 256, 256)
    found = []
    for is_half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            out = critic(video)
        found.append(torch.autograd.grad(out.square().mean(), list(critic.parameters())))
    for exact, half in zip(*found, strict=True):
        assert (half - exact).norm() < 0.05 * exact.norm()
