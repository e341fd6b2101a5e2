"""A 3×3 conv whose output channels have different dilations: the arithmetic of the frozen conv.

It is a function of its own in autograd, so that only its input and its weight are kept for
backward, and not the pieces that they are cut into; and so that the weight's gradient can be
computed otherwise where the usual way is slow (:func:`weight_gradient`).
"""

from typing import List, Optional

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

__all__ = ["dilated_conv2d", "conv2d", "weight_gradient"]

# Without AVX-512 oneDNN has no kernel for the gradient of dilated weights. Measured on CPUs with
# AVX2 (docs/performance.md), not on those with less or of other makes.
_MATRIX_PRODUCTS = torch.backends.cpu.get_cpu_capability() == "AVX2"


def dilated_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    stride: List[int],
    inputs: List[int],
    channels: List[int],
    dilations: List[List[int]],
    branches: List[List[int]],
) -> torch.Tensor:
    """A 3×3 conv in runs of output channels, each padded by its dilation. Differentiable once.

    A run holds whole conv groups, which read their own input channels.

    Args:
        x: (B, C_in, H, W).
        weight: (C_out, C_in / groups, 3, 3).
        bias: (C_out,), or None.
        stride: of height and width.
        inputs: with conv groups the input channels of each run, which add up to C_in; else empty.
        channels: output channels of each run; they add up to C_out.
        dilations: of height and width, each dilation once.
        branches: for each dilation the indices of its runs, each run once.

    Returns:
        (B, C_out, H / stride, W / stride).
    """
    if not torch.jit.is_scripting() and not torch.jit.is_tracing():
        x, weight, bias = _cast([x, weight, bias])
        if torch.is_grad_enabled():
            return _DilatedConv2d.apply(
                x, weight, bias, stride, inputs, channels, dilations, branches
            )
    return _forward(x, weight, bias, stride, inputs, channels, dilations, branches)


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    stride: List[int],
    inputs: List[int],
    channels: List[int],
    dilations: List[List[int]],
    branches: List[List[int]],
) -> torch.Tensor:
    weights = _cut(weight, channels, 0)
    biases = _cut(bias, channels, 0) if bias is not None else []
    slices = _cut(x, inputs, 1) if len(inputs) > 0 else []
    outputs = [x] * len(channels)  # per run, each replaced in the loop
    for dilation, runs in zip(dilations, branches):
        rows = _joined([weights[run] for run in runs], 0)
        # not "if bias is not None": TorchScript, asked twice, gives None after the first call
        shift = _joined([biases[run] for run in runs], 0) if len(biases) > 0 else None
        read = _joined([slices[run] for run in runs], 1) if len(slices) > 0 else x
        y = F.conv2d(read, rows, shift, stride, dilation, dilation, read.shape[1] // rows.shape[1])
        _put(y, outputs, runs, channels, 1)
    return _joined(outputs, 1)


def _cast(tensors: List[Optional[torch.Tensor]]) -> List[Optional[torch.Tensor]]:
    """What autocast would do in the conv of each branch, once."""
    device = tensors[0].device.type
    # the meta device has no autocast; asking for that would stop torch.compile up to PyTorch 2.5
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    if enabled and tensors[0].dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        tensors = [tensor.to(dtype) if tensor is not None else None for tensor in tensors]
    return tensors


class _DilatedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *how):
        ctx.save_for_backward(x, weight)
        ctx.how = how
        return _forward(x, weight, bias, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        stride, inputs, channels, dilations, branches = ctx.how
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        weights, gradients = _cut(weight, channels, 0), _cut(gradient, channels, 1)
        slices = _cut(x, inputs, 1) if inputs else []
        by_x, by_slices, by_weights = None, [x] * len(channels), [weight] * len(channels)
        for dilation, runs in zip(dilations, branches):
            rows = _joined([weights[run] for run in runs], 0)
            by_y = _joined([gradients[run] for run in runs], 1)
            read = _joined([slices[run] for run in runs], 1) if slices else x
            own = of_weight and _is_slow(read, rows, stride, dilation)
            by_read, by_rows, _ = torch.ops.aten.convolution_backward(
                *(by_y, read, rows, None, stride, dilation, dilation, False, [0, 0]),
                *(read.shape[1] // rows.shape[1], [of_x, of_weight and not own, False]),
            )
            if own:
                by_rows = weight_gradient(read, by_y, dilation)
            if of_weight:
                _put(by_rows, by_weights, runs, channels, 0)
            if of_x and slices:
                _put(by_read, by_slices, runs, inputs, 1)
            elif of_x:
                by_x = by_read if by_x is None else by_x.add_(by_read)
            del by_read, by_y  # or they would stay while the next branch's are made
        if of_x and slices:
            by_x = _joined(by_slices, 1)
        by_weight = _joined(by_weights, 0) if of_weight else None
        by_bias = gradient.sum((0, 2, 3)) if of_bias else None
        return by_x, by_weight, by_bias, *[None] * len(ctx.how)


def conv2d(
    x: torch.Tensor, weight: torch.Tensor, stride: List[int], dilation: List[int], groups: int
) -> torch.Tensor:
    """A 3×3 conv with one dilation: :func:`dilated_conv2d` where it gains, else F.conv2d.

    Differentiable once where it gains, which depends on the kind of CPU.
    """
    if _is_slow(x, weight, stride, dilation) and not torch.is_autocast_enabled("cpu"):
        channels = [weight.shape[0]]
        return dilated_conv2d(x, weight, None, stride, [], channels, [dilation], [[0]])
    return F.conv2d(x, weight, None, stride, dilation, dilation, groups)


def _is_slow(x: torch.Tensor, weight: torch.Tensor, stride: List[int], dilation: List[int]) -> bool:
    """Whether :func:`weight_gradient` is faster than PyTorch's own gradient, and can be used."""
    return (
        _MATRIX_PRODUCTS
        and x.is_cpu
        and x.shape[1] == weight.shape[1]  # no conv groups
        and x.dtype in (torch.float32, torch.float64)
        and tuple(stride) == (1, 1)
        and tuple(dilation) != (1, 1)
    )


def weight_gradient(x: torch.Tensor, gradient: torch.Tensor, dilation: List[int]) -> torch.Tensor:
    """The gradient of a dilated conv's weight, of stride 1 and without conv groups.

    Nine matrix products, one per tap (i, j) of the kernel: the output's gradient times the input
    shifted by (i · d_h, j · d_w). A shift is an offset into the padded, flattened image, and
    nothing is unrolled; oneDNN without AVX-512 unrolls the image to nine times its size, however
    few output channels there are.

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
            tap += by_image @ image[:, offset : offset + length].t()
    return taps.permute(1, 2, 0).contiguous().view(gradient.shape[1], x.shape[1], 3, 3)


def _cut(tensor: torch.Tensor, sizes: List[int], dim: int) -> List[torch.Tensor]:
    """Consecutive pieces of `tensor` along `dim`; of these sizes, which add up to it."""
    if len(sizes) == 1:
        return [tensor]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    # narrow(), not split(): exporters fold a weight's narrow() into a constant
    return [tensor.narrow(dim, end - size, size) for end, size in zip(ends, sizes)]


def _put(
    tensor: torch.Tensor,
    pieces: List[torch.Tensor],
    chosen: List[int],
    sizes: List[int],
    dim: int,
) -> None:
    """What `_joined` does with the chosen pieces, undone: each is set to its part of `tensor`."""
    for index, piece in zip(chosen, _cut(tensor, [sizes[index] for index in chosen], dim)):
        pieces[index] = piece


def _joined(pieces: List[torch.Tensor], dim: int) -> torch.Tensor:
    """The concatenation; no copy of a single piece."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
