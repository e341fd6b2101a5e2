"""A network made ready for deployment: same outputs, less to do per image."""

from collections import Counter
from typing import Iterator, Tuple

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .errors import NATSError
from .layers import MixedDilationConv2d
from .stages import is_plain_conv

__all__ = ["fuse_for_inference"]


@torch.no_grad()
def fuse_for_inference(module: nn.Module) -> nn.Module:
    """Fold batch norms into the convs before them, in place.

    Up to rounding the outputs are the same. Convs whose norm is not a batch norm are left alone,
    and so are pairs in modules whose `forward` torch.fx cannot follow. Call it last: parameters no
    longer stand where a plain checkpoint has them.

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
    uses = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
    for parent in list(module.modules()):
        if is_plain_conv(parent) and _is_batch_norm(getattr(parent, "norm", None)):
            _fold(parent, parent.norm)  # Detectron2's convs hold their norm
            parent.norm = None
        elif any(_is_batch_norm(child) for child in parent.children()):
            for conv, norm in list(_pairs(parent)):
                pair = parent.get_submodule(conv), parent.get_submodule(norm)
                if all(uses[id(part)] == 1 for part in pair):
                    _fold(*pair)
                    setattr(parent, norm, nn.Identity())
    return module


_BATCH_NORMS = (
    "torch.nn.modules.batchnorm",
    "detectron2.layers.batch_norm",
    "torchvision.ops.misc",
)
"""Where the `forward` of a norm is defined that is a batch norm in eval mode, and nothing more."""


def _is_batch_norm(module: object) -> bool:
    return (
        isinstance(module, nn.Module)
        and type(module).forward.__module__ in _BATCH_NORMS
        and getattr(module, "running_var", None) is not None
    )


def _fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)


class _ChildrenTracer(fx.Tracer):
    """Follows one module's own `forward`; what its children do is not looked at."""

    def is_leaf_module(self, *_) -> bool:
        return True


def _pairs(parent: nn.Module) -> Iterator[Tuple[str, str]]:
    """Names of `parent`'s conv and norm wherever the norm alone reads what the conv gives."""
    try:
        nodes = list(_ChildrenTracer().trace(parent).nodes)
    except Exception:  # whatever a forward says to a tensor that is none
        return
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    for node in nodes:
        conv = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(conv, fx.Node) or conv.op != "call_module" or len(conv.users) > 1:
            continue
        pair = parent.get_submodule(conv.target), parent.get_submodule(node.target)
        bare = not any(getattr(pair[0], own, None) for own in ("norm", "activation"))
        if calls[node.target] == calls[conv.target] == 1 and "." not in node.target:
            if bare and is_plain_conv(pair[0]) and _is_batch_norm(pair[1]):
                yield conv.target, node.target
