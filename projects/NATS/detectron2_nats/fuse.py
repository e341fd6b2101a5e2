"""A frozen network made ready for deployment: same outputs, less to do per image."""

from collections import Counter
from typing import List, Sequence

import torch
from torch import nn

from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock

from .architecture import Run
from .errors import NATSError
from .layers import GroupedDilationConv2d, MixedDilationConv2d

__all__ = ["fuse_for_inference"]

_FOLDABLE = (FrozenBatchNorm2d, nn.modules.batchnorm._BatchNorm)


@torch.no_grad()
def fuse_for_inference(module: nn.Module) -> nn.Module:
    """Sort the frozen convs' rows by dilation and fold batch norms into convs, in place.

    A conv's output channels then lie in the order of its branches, which are put one after the
    other and nothing is put back; the columns of the block's next conv are permuted to match. Up
    to rounding the outputs are the same. Convs whose norm is not a batch norm are left alone.

    Call it last: parameters no longer stand where a plain checkpoint has them.

    Args:
        module: a frozen or plain network in eval mode; a whole detector too.

    Returns:
        `module` itself.

    Raises:
        NATSError: it is in training mode or a super-network. Nothing has been changed then.
    """
    for name, part in module.named_modules():
        if part.training:
            raise NATSError(f"{name or 'the network'} is in training mode: call eval() first")
        if isinstance(part, MixedDilationConv2d):
            raise NATSError(f"{name} belongs to a super-network: freeze it first")
    for conv in [m for m in module.modules() if isinstance(m, Conv2d)]:
        if isinstance(conv.norm, _FOLDABLE):
            _fold_norm(conv)
    for block in [m for m in module.modules() if isinstance(m, (BasicBlock, BottleneckBlock))]:
        # Only convs that one conv alone reads from: the last one's output is added to the block's.
        _sort(block, "conv1", "conv2")
        if isinstance(block, BottleneckBlock):
            _sort(block, "conv2", "conv3", before="conv1")
    return module


def _sort(block: nn.Module, name: str, after: str, before: str = "") -> None:
    """Sort the rows of one conv; the conv after it reads them in their new order."""
    conv, after = getattr(block, name), getattr(block, after)
    if not isinstance(conv, GroupedDilationConv2d) or conv.norm is not None or after.groups > 1:
        return
    order = _order_by_dilation(conv)
    if conv.groups > 1:  # whole conv groups move, and what each reads moves along
        before = getattr(block, before, None)
        if before is None or before.norm is not None or before.groups > 1:
            return
        moved = order[:: conv.out_channels // conv.groups] // (conv.out_channels // conv.groups)
        _permute_rows(before, torch.arange(conv.in_channels).view(conv.groups, -1)[moved].flatten())
    _permute_rows(conv, order)
    setattr(block, name, GroupedDilationConv2d(conv, _runs(conv.runs, order)))
    after.weight = _like(after.weight, after.weight[:, order])


def _fold_norm(conv: Conv2d) -> None:
    norm = conv.norm
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    bias = -norm.running_mean * scale
    if norm.bias is not None:
        bias = bias + norm.bias
    if conv.bias is not None:
        bias = bias + conv.bias * scale
    conv.weight = _like(conv.weight, conv.weight * scale.view(-1, 1, 1, 1))
    conv.bias = _like(conv.weight, bias)
    conv.norm = None


def _order_by_dilation(conv: GroupedDilationConv2d) -> torch.Tensor:
    """(C_out,): the old place of each new output channel; stable within a dilation."""
    dilations = [d for channels, *d in conv.runs for _ in range(channels)]
    order = sorted(range(len(dilations)), key=lambda channel: dilations[channel])
    return torch.tensor(order, device=conv.weight.device)


def _permute_rows(conv: nn.Conv2d, order: torch.Tensor) -> None:
    conv.weight = _like(conv.weight, conv.weight[order])
    if conv.bias is not None:
        conv.bias = _like(conv.bias, conv.bias[order])


def _runs(runs: Sequence[Run], order: torch.Tensor) -> List[Run]:
    """The runs of the rows in their new order, one for each dilation."""
    dilations = [tuple(d) for channels, *d in runs for _ in range(channels)]
    counts = Counter(dilations[channel] for channel in order.tolist())  # keeps the order
    return [(count, *dilation) for dilation, count in counts.items()]


def _like(parameter: nn.Parameter, value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(parameter.dtype), requires_grad=parameter.requires_grad)
