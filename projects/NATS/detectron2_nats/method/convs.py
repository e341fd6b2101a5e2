"""Which convs can have other dilations, in any network, and turning them into others."""

import difflib
from fnmatch import fnmatchcase
from typing import Dict, List, Mapping, Sequence, Tuple

import torch
from torch import nn

from ..errors import NATSError
from .layers import GroupedDilationConv2d, MixedDilationConv2d, same_padding

_PLAIN_FORWARDS = (
    "torch.nn.modules.conv",
    "detectron2.layers.wrappers",  # its norm and activation follow
    "mmcv.cnn.bricks.wrappers",  # takes empty batches
)
"""Where the `forward` of a plain conv is defined."""


def is_plain_conv(conv: nn.Module) -> bool:
    """Whether it does what `nn.Conv2d` does, with its weight as it is (not standardised, say)."""
    return not _other_computation(conv)


def _other_computation(conv: nn.Module) -> str:
    """Why it is not a plain conv, nor one that replaced it; else ""."""
    if isinstance(conv, (MixedDilationConv2d, GroupedDilationConv2d)):
        return ""
    if isinstance(conv, nn.Conv2d) and "weight" not in conv._parameters:
        return "its weight is computed (weight_norm, pruning, …)"
    if (
        not isinstance(conv, nn.Conv2d)
        or type(conv).forward.__module__ not in _PLAIN_FORWARDS
        or type(conv)._conv_forward is not nn.Conv2d._conv_forward
    ):
        return type(conv).__name__
    return ""


def why_not(conv: nn.Module) -> str:
    """Why a conv larger than 1×1 cannot have another dilation; "" if it can."""
    why = _other_computation(conv)
    if not why and not isinstance(conv, (MixedDilationConv2d, GroupedDilationConv2d)):
        try:
            same_padding(conv)
        except NATSError as error:
            why = str(error)
    return why


def all_convs(network: nn.Module) -> Dict[str, nn.Module]:
    """Module path → every conv larger than 1×1, of whatever class, in the network's order."""
    return {path: part for path, part in network.named_modules() if _is_large_conv(part)}


def _is_large_conv(part: nn.Module) -> bool:
    kernel = getattr(part, "kernel_size", 1)
    if isinstance(part, nn.modules.conv._ConvTransposeNd) or kernel in (1, (1, 1)):
        return False
    weight = getattr(part, "weight", None)
    return torch.is_tensor(weight) and weight.ndim == 4


def convs_by_path(network: nn.Module) -> Tuple[Dict[str, nn.Conv2d], Dict[str, str]]:
    """All convs larger than 1×1.

    Returns:
        Module path → each that can have another dilation, or that replaced one; and path → why not,
        of each other.
    """
    able: Dict[str, nn.Conv2d] = {}
    others: Dict[str, str] = {}
    owners: Dict[int, str] = {}  # of each weight
    for path, conv in all_convs(network).items():
        reason = why_not(conv)
        if not reason and owners.setdefault(id(conv.weight), path) != path:
            reason = f"it shares its weight with {owners[id(conv.weight)]}"
            able.pop(owners[id(conv.weight)], None)
            others[owners[id(conv.weight)]] = f"it shares its weight with {path}"
        if reason:
            others[path] = reason
        else:
            able[path] = conv
    return able, others


def matching_convs(
    network: nn.Module, patterns: Sequence[str]
) -> Tuple[Dict[str, nn.Conv2d], Dict[str, str]]:
    """As :func:`convs_by_path`, of the convs whose path matches one of the patterns.

    Raises:
        NATSError: a pattern has no conv of its own that can have another dilation; names near ones.
    """
    able, others = convs_by_path(network)
    first = {path: _first_match(path, patterns) for path in (*able, *others)}
    found = {path: conv for path, conv in able.items() if first[path]}
    for pattern in patterns:
        if any(first[path] == pattern for path in found):
            continue
        reasons = [f"{path}: {why}" for path, why in others.items() if fnmatchcase(path, pattern)]
        taken = [path for path in found if fnmatchcase(path, pattern)]
        if taken:
            cure = f"{taken[0]} belongs to {first[taken[0]]!r}, which comes first"
        elif reasons:
            cure = "; ".join(reasons[:3])
        else:
            near = near_paths(pattern, able)
            cure = f"near are {', '.join(near)}" if near else "the network has none"
        raise NATSError(f"CONVS {pattern!r} matches no conv that can be searched: {cure}")
    return found, {path: why for path, why in others.items() if first[path]}


def _first_match(path: str, patterns: Sequence[str]) -> str:
    return next((pattern for pattern in patterns if fnmatchcase(path, pattern)), "")


def near_paths(path: str, paths: Mapping[str, nn.Module]) -> List[str]:
    """Up to five paths most like `path`; the first ones where none is."""
    return difflib.get_close_matches(path, paths, 5, 0.3) or list(paths)[:5]


def turn_into(conv: nn.Conv2d, other: nn.Conv2d) -> None:
    """Make a conv what `other` is, in place: whoever holds it calls the new one. Its hooks stay.

    Putting `other` where the conv is registered would not do: Detectron2's FPN calls its convs from
    a list of its own.
    """
    hooks = {name: value for name, value in vars(conv).items() if "hook" in name}
    conv.__dict__ = {**vars(other), **hooks}
    conv.__class__ = type(other)


def searched_layers(module: nn.Module) -> Dict[str, MixedDilationConv2d]:
    """Layer name → searched conv of a super-network (empty for a plain or frozen network).

    The names are those that :func:`.to_supernet` gave, wherever in `module` its network lies.
    """
    convs = [conv for conv in module.modules() if isinstance(conv, MixedDilationConv2d)]
    layers = {conv.layer: conv for conv in convs}
    if len(layers) < len(convs):
        raise NATSError("two super-networks in one module: pass the one that is searched")
    return layers
