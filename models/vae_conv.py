"""Convolutions of the causal video VAE, and how they run at full speed on a CPU.

Layout (B, C, T, H, W) in channels-last memory. Figures are of one thread on an AVX2 CPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# aten sends fp32 convolutions of one sample with N·C·T·H at or below this to slow_conv3d, which is
# 6 to 18 times slower than oneDNN.
SLOW_CONV_LIMIT = 20480
# Below these, oneDNN's weight gradient is as fast as products of matrices; with AVX512 it is the
# faster one at every size, by 5 to 14 % of the forward and backward pass.
PRODUCTS_MIN_CHANNELS, PRODUCTS_MIN_AREA = 16, 256
SAFE_AREA = 1024  # pixels of a frame for which oneDNN's bf16 weight gradient of clips was right
HAS_WIDE_VECTORS = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


class Stream:
    """What one causal pass in chunks remembers: the last frames that each module has seen.

    `is_started` says that the first chunk, the one with the clip's frame 0, has gone through.
    """

    def __init__(self) -> None:
        self.is_started = False
        self._last: dict[nn.Module, Tensor] = {}

    def join(self, module: nn.Module, x: Tensor, length: int) -> Tensor:
        """x behind the last `length` frames that `module` saw before, or as many as it did see."""
        if module in self._last:
            x = torch.cat((self._last[module], x), dim=2)
        self._last[module] = x[:, :, -length:].clone()  # a view would keep the whole chunk
        return x


class CausalConv3d(nn.Conv3d):
    """3-D convolution that sees no later frame: zeros stand for the frames before the first.

    (B, C, T, H, W) → (B, C', T, H, W). With a stride in time, for kernels of one pixel only,
    nothing stands before the first frame.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int, int] = (3, 3, 3),
        *,
        time_stride: int = 1,
    ) -> None:
        assert time_stride == 1 or kernel_size[1:] == (1, 1)
        super().__init__(in_channels, out_channels, kernel_size, stride=(time_stride, 1, 1))
        self.history = kernel_size[0] - 1 if time_stride == 1 else 0

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        taps, zeros = self.kernel_size[0], self.history
        if stream is not None and self.history:
            chunk, x = x, stream.join(self, x, self.history)
            zeros -= x.shape[2] - chunk.shape[2]
        if self.kernel_size[1:] == (1, 1):
            return self._over_time(F.pad(x, (0, 0, 0, 0, zeros, 0)))
        if x.shape[2] + zeros == taps:  # the zeros add nothing: a convolution of the real frames
            return self._one_frame(x)
        return self._full_frames(F.pad(x, (0, 0, 0, 0, zeros, 0)) if zeros else x)

    def _one_frame(self, x: Tensor) -> Tensor:
        """The frame that sees all of x and nothing else: a 2-D convolution."""
        weight = self.weight[:, :, -x.shape[2] :].flatten(1, 2)
        return convolve(x.flatten(1, 2), weight, self.bias).unsqueeze(2)  # (B, C', 1, H, W)

    def _full_frames(self, x: Tensor) -> Tensor:
        """The T − taps + 1 frames that see as many frames of x as the kernel has taps."""
        taps = self.kernel_size[0]
        frames = x.shape[2] - taps + 1
        if not _is_slow(x):
            return convolve(x, self.weight, self.bias)
        half = (frames + 1) // 2  # two overlapping halves as a batch of two
        x = torch.cat((x[:, :, : half + taps - 1], x[:, :, frames - half :]))
        y = convolve(x, self.weight, self.bias)
        return torch.cat((y[:1], y[1:, :, 2 * half - frames :]), dim=2)

    def _over_time(self, x: Tensor) -> Tensor:
        """A kernel of one pixel is one product with the frames it sees; oneDNN declines it."""
        taps, stride = self.kernel_size[0], self.stride[0]
        last = x.shape[2] - taps + 1
        seen = torch.cat([x[:, :, tap : tap + last : stride] for tap in range(taps)], dim=1)
        weight = self.weight.transpose(1, 2).flatten(1)  # (C', taps·C)
        return F.linear(seen.movedim(1, -1), weight, self.bias).movedim(-1, 1)


class FrameConv2d(nn.Conv2d):
    """3×3 convolution of frames: (N, C, H, W) → (N, C', H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution with zeros around the frame, in time none.

    x is (B, C, T, H, W) for a 3-D kernel, (N, C, H, W) for a 2-D one. Odd kernels keep H and W.
    """
    if _by_products(x, weight):
        return _Convolution.apply(x, weight, bias)
    if _may_overrun(x):
        assert bias is not None
        return _Convolution.apply(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    convolution = F.conv2d if x.dim() == 4 else F.conv3d
    return convolution(x, weight, bias, padding=_padding(weight))


class _Convolution(Function):
    """A convolution whose weight gradient is not oneDNN's own.

    In fp32 it is one matrix product per tap of the kernel: in channels-last memory oneDNN's runs at
    16 to 27 GFLOP/s where the convolution itself and these products reach 53 to 77.

    In bf16 it is that of frames, one for each tap in time: with AMX oneDNN's of a 3-D kernel writes
    past its memory where frames are large and few (32 channels, 5 frames of 64×64), and gives NaN.
    A step on clips of such frames takes 4 to 20 % longer so.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ones = [1] * (x.dim() - 2)
        return torch.ops.aten.convolution(
            x, weight, bias, ones, _padding(weight), ones, False, [0] * len(ones), 1
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        ones, d_x = [1] * (x.dim() - 2), None
        if ctx.needs_input_grad[0]:
            only_x = [True, False, False]
            d_x = torch.ops.aten.convolution_backward(
                *(grad, x, weight, None, ones, _padding(weight), ones, False),
                *([0] * len(ones), 1, only_x),
            )[0]
        by_taps = _gradient_by_frames if x.dtype == torch.bfloat16 else _gradient_by_products
        return d_x, by_taps(x, grad, weight), grad.movedim(1, -1).flatten(0, -2).sum(0)


def _gradient_by_frames(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of a 3-D convolution's weight, of the shape of `weight`."""
    frames, ones = grad.shape[2], [1, 1]
    flat = grad.transpose(1, 2).flatten(0, 1)  # (B·T, C', H, W), a view in channels-last memory
    taps = [
        torch.ops.aten.convolution_backward(
            *(flat, x[:, :, tap : tap + frames].transpose(1, 2).flatten(0, 1), weight[:, :, tap]),
            *(None, ones, _padding(weight)[1:], ones, False, [0, 0], 1, [False, True, False]),
        )[1]
        for tap in range(weight.shape[2])
    ]
    return torch.stack(taps, dim=2)


def _gradient_by_products(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of a convolution's weight, of the shape of `weight`.

    Input and gradient lie on one grid with the zeros around the frame, (B, positions, channels):
    a tap then sees the input moved by a fixed number of rows, without a copy.
    """
    if x.dim() == 4:  # frames of a clip with a kernel of one frame
        x, grad, kernel = x.unsqueeze(2), grad.unsqueeze(2), (1, *weight.shape[2:])
    else:
        kernel = weight.shape[2:]
    rim_h, rim_w = kernel[1] // 2, kernel[2] // 2
    x = F.pad(x.movedim(1, -1), (0, 0, rim_w, rim_w, rim_h, rim_h))  # (B, T, H', W', C)
    grad = F.pad(grad.movedim(1, -1), (0, 0, 0, 2 * rim_w, 0, 2 * rim_h))
    height, width = x.shape[2:4]
    x, grad = x.flatten(1, 3), grad.flatten(1, 3)
    count = grad.shape[1] - (kernel[1] - 1) * width - (kernel[2] - 1)  # zeros follow
    grad = grad[:, :count].transpose(1, 2)
    products = [
        torch.bmm(grad, x[:, start : start + count]).sum(0)  # (C', C)
        for t in range(kernel[0])
        for i in range(kernel[1])
        for start in range((t * height + i) * width, (t * height + i) * width + kernel[2])
    ]
    return torch.stack(products, dim=2).view_as(weight)


def _padding(weight: Tensor) -> list[int]:
    return [0] * (weight.dim() - 4) + [size // 2 for size in weight.shape[-2:]]


def _is_plain_fp32(x: Tensor) -> bool:
    """fp32 on a CPU, and to stay so."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return on_cpu and not torch.is_autocast_enabled("cpu")


def is_bf16_on_cpu(x: Tensor) -> bool:
    """bf16 on a CPU, or to become so by autocast."""
    under = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.device.type == "cpu" and (under or x.dtype == torch.bfloat16)


def _may_overrun(x: Tensor) -> bool:
    return x.dim() == 5 and x.shape[-2:].numel() > SAFE_AREA and is_bf16_on_cpu(x)


def _is_slow(x: Tensor) -> bool:
    return x.shape[0] == 1 and x.shape[:4].numel() <= SLOW_CONV_LIMIT and _is_plain_fp32(x)


def _by_products(x: Tensor, weight: Tensor) -> bool:
    return (
        not HAS_WIDE_VECTORS
        and min(weight.shape[:2]) >= PRODUCTS_MIN_CHANNELS
        and x.shape[-2:].numel() >= PRODUCTS_MIN_AREA
        and _is_plain_fp32(x)
    )
