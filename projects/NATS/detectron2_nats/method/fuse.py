"""A network made ready for deployment: same outputs, less to do per image."""

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..errors import NATSError
from .layers import MixedDilationConv2d


@torch.no_grad()
def fuse_for_inference(module: nn.Module) -> nn.Module:
    """Fold batch norms into the convs that hold them, as Detectron2's do, in place.

    Up to rounding the outputs are the same. Convs with another kind of norm are left alone, and
    so are norms beside their convs (torchvision, timm, mmdet): torch.compile deals with those.
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
    for conv in [m for m in module.modules() if isinstance(m, nn.Conv2d)]:
        norm = getattr(conv, "norm", None)
        if getattr(norm, "running_var", None) is not None:
            statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
            conv.norm = None
    return module
