"""Convolutions on images that have become small, as they train on a CPU: the same results, faster.

    speed_up_convolutions_(model)            the layers of a model that qualify, in place; weights and names stay

The last stages of a network for images of 64 pixels see 4 x 4 and 2 x 2 positions, and oneDNN, which torch calls, is
not made for them. Measured on one core of an EPYC (Zen 3), batch 32, forward and backward:

- A convolution whose kernel is larger than its image is a matmul of what each tap of the kernel sees: 205 ms become 50
  for 512 channels of 2 x 2 positions and a 3x3 kernel, as in the last stage of a ResNet-18.
- The weights' gradient of a depthwise one takes 19 ms for 288 channels of 4 x 4 positions and a 5x5 kernel, and 2 ms as
  one weighted sum for each tap.
- A 1x1 convolution of a few positions is a matmul, since an image with its channels last is a matrix: 26 ms become 9 in
  the eighteen of a MobileNetV3-small that squeeze and excite.
- A 1x1 convolution of stride 2 is a matmul, too: with channels last, torch 2.13 writes past the end of some memory for
  4 channels on one thread, which ended the process.

Elsewhere (larger images, inference, a GPU, autocast, compiled code) the layers are torch's own. Called by the task
`image_classification`. Results differ from torch's by rounding, as sums in another order do.

Shapes: B images, C channels, H x W positions, K x K taps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

MOST_POSITIONS = 16
"""Positions of an image up to which a 1x1 convolution is computed as a matmul."""


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution that is a matmul where an image has few positions, or not all of them are seen."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out_channels, H, W)."""
        stride = self.stride[0]
        is_small = input.shape[2] * input.shape[3] <= MOST_POSITIONS
        if not trains_on_cpu(self, input) or (stride == 1 and not is_small):
            return super().forward(input)
        seen_BCHW = input[:, :, ::stride, ::stride]
        return F.linear(seen_BCHW.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class GatheredConv2d(nn.Conv2d):
    """A convolution that is a matmul of what its taps see where the kernel exceeds the image."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out_channels, H', W')."""
        kernel, stride, padding = self.kernel_size[0], self.stride[0], int(self.padding[0])
        if not trains_on_cpu(self, input) or kernel <= max(input.shape[2:]):
            return super().forward(input)
        seen_BHWN = torch.cat(list_taps(input, kernel, stride, padding), dim=3)
        matrix_ON = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(seen_BHWN, matrix_ON, self.bias).permute(0, 3, 1, 2)


class DepthwiseConv2d(nn.Conv2d):
    """A convolution of each channel alone whose weights learn by sums over taps where the kernel exceeds the image."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H', W')."""
        if not trains_on_cpu(self, input) or self.kernel_size[0] <= max(input.shape[2:]):
            return super().forward(input)
        output: Tensor = _Depthwise.apply(input, self.weight, self.stride[0], int(self.padding[0]))  # type: ignore[no-untyped-call]
        return output if self.bias is None else output + self.bias[:, None, None]


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution with a backward pass of its own for the weights."""

    @staticmethod
    def forward(context: Any, image_BCHW: Tensor, weight_C1KK: Tensor, stride: int, padding: int) -> Tensor:
        context.save_for_backward(image_BCHW, weight_C1KK)
        context.stride, context.padding = stride, padding
        return F.conv2d(image_BCHW, weight_C1KK, None, stride, padding, groups=len(weight_C1KK))

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_BCHW: Tensor) -> tuple[Tensor | None, ...]:
        image_BCHW, weight_C1KK = context.saved_tensors
        stride, padding = context.stride, context.padding
        to_image = to_weight = None
        if context.needs_input_grad[0]:
            to_image = conv2d_input(
                image_BCHW.shape, weight_C1KK, gradient_BCHW, stride, padding, groups=len(weight_C1KK)
            )
        if context.needs_input_grad[1]:
            to_weight = sum_taps(image_BCHW, gradient_BCHW, weight_C1KK.shape[-1], stride, padding)
        return to_image, to_weight, None, None


def sum_taps(image_BCHW: Tensor, gradient_BCHW: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """(C, 1, K, K) gradient of the weights of a depthwise convolution: what each tap saw, weighted by the outputs'.

    >>> sum_taps(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), 3, 1, 1)[0, 0].tolist()
    [[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]
    """
    gradient_BHWC = gradient_BCHW.permute(0, 2, 3, 1)
    sums = [(tap_BHWC * gradient_BHWC).sum((0, 1, 2)) for tap_BHWC in list_taps(image_BCHW, kernel, stride, padding)]
    return torch.stack(sums, dim=1).view(-1, 1, kernel, kernel)


def list_taps(image_BCHW: Tensor, kernel: int, stride: int, padding: int) -> list[Tensor]:
    """Return what each tap of a K x K kernel sees at each position of the output, row by row: (B, H', W', C)."""
    padded_BHWC = F.pad(image_BCHW.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    height, width = (edge - kernel + 1 for edge in padded_BHWC.shape[1:3])
    return [
        padded_BHWC[:, row : row + height : stride, column : column + width : stride]
        for row in range(kernel)
        for column in range(kernel)
    ]


def trains_on_cpu(layer: nn.Conv2d, input: Tensor) -> bool:
    """Return whether `layer` learns from `input` in FP32 on a CPU, as it is written and not compiled."""
    return (
        layer.training
        and torch.is_grad_enabled()
        and input.device.type == "cpu"
        and input.ndim == 4
        and input.dtype == layer.weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def speed_up_convolutions_(model: nn.Module) -> int:
    """Let the convolutions of `model` that qualify train faster on small images; return how many there are.

    >>> speed_up_convolutions_(nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 5, padding=2, groups=4)))
    2
    """
    num_changed = 0
    for module in model.modules():
        chosen = _choose_class(module) if type(module) is nn.Conv2d else None
        if chosen is not None:
            module.__class__ = chosen  # state, hooks and names stay
            num_changed += 1
    return num_changed


def _choose_class(layer: nn.Conv2d) -> type[nn.Conv2d] | None:
    kernel, padding = layer.kernel_size, layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str) or layer.dilation != (1, 1):
        return None
    if any(first != second for first, second in (kernel, layer.stride, padding)):
        return None
    if kernel == (1, 1):
        return PointwiseConv2d if layer.groups == 1 and padding == (0, 0) else None
    if layer.groups == 1:
        return GatheredConv2d
    return DepthwiseConv2d if layer.groups == layer.in_channels == layer.out_channels else None
