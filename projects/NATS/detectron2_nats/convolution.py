"""F.conv2d with a faster gradient of dilated 3×3 weights, for CPUs where oneDNN has none.

Without AVX-512 oneDNN unrolls the whole input for that gradient, to nine times its size, and does
so for each dilation of a frozen conv, however few output channels use it. Here it is nine matrix
products, one per tap (i, j) of the kernel: the output's gradient times the input shifted by
(i · d_h, j · d_w). Nothing is unrolled: a shift is an offset into the padded, flattened image.
"""

from typing import List, Optional

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

__all__ = ["conv2d"]

# Where it was measured to be faster (docs/performance.md).
_MATRIX_PRODUCTS = torch.backends.cpu.get_cpu_capability() == "AVX2"


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    stride: List[int],
    dilation: List[int],
    groups: int,
) -> torch.Tensor:
    """A 3×3 conv, padded by its dilation.

    Args:
        x: (B, C_in, H, W).
        weight: (C_out, C_in / groups, 3, 3).
        bias: (C_out,), or None.
        stride, dilation: of height and width.
        groups: conv groups.

    Returns:
        (B, C_out, H / stride, W / stride), always F.conv2d's own.
    """
    if not torch.jit.is_scripting():
        if _by_matrix_products(x, weight, stride, dilation, groups):
            return _Conv2d.apply(x, weight, bias, dilation)
    return F.conv2d(x, weight, bias, stride, dilation, dilation, groups)


def _by_matrix_products(x, weight, stride, dilation, groups) -> bool:
    return (
        _MATRIX_PRODUCTS
        and weight.requires_grad
        and torch.is_grad_enabled()
        and groups == 1
        and tuple(stride) == (1, 1)
        and tuple(dilation) != (1, 1)
        and x.is_cpu
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()  # those who count FLOPs look for the usual conv
    )


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dilation):
        ctx.save_for_backward(x, weight)
        ctx.bias_sizes = None if bias is None else bias.shape
        ctx.dilation = dilation
        return F.conv2d(x, weight, bias, padding=dilation, dilation=dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        by_x, _, by_bias = torch.ops.aten.convolution_backward(
            *(gradient, x, weight, ctx.bias_sizes, [1, 1], ctx.dilation, ctx.dilation),
            *(False, [0, 0], 1, [of_x, False, of_bias]),
        )
        by_weight = weight_gradient(x, gradient, ctx.dilation) if of_weight else None
        return by_x, by_weight, by_bias, None


def weight_gradient(x: torch.Tensor, gradient: torch.Tensor, dilation: List[int]) -> torch.Tensor:
    """The gradient of a dilated conv's weight, of stride 1.

    Args:
        x: (B, C_in, H, W), the conv's input.
        gradient: (B, C_out, H, W), of its output.
        dilation: of height and width.

    Returns:
        (C_out, C_in, 3, 3).
    """
    height, width = x.shape[2:]
    d_h, d_w = dilation
    row = width + 2 * d_w
    length = height * row - 2 * d_w  # from an image's first pixel to its last one
    taps = x.new_zeros(9, gradient.shape[1], x.shape[1])
    for image, by_image in zip(x, gradient):
        # both in rows of the same length; what is behind a row's end meets zeros of the gradient
        image = F.pad(image, (d_w, d_w, d_h, d_h)).flatten(1)
        by_image = F.pad(by_image, (0, 2 * d_w)).flatten(1)[:, :length]
        for index, tap in enumerate(taps):
            offset = index // 3 * d_h * row + index % 3 * d_w
            tap.addmm_(by_image, image[:, offset : offset + length].t())
    return taps.permute(1, 2, 0).reshape(*taps.shape[1:], 3, 3)
