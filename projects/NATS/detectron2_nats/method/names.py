"""The names of a network's convs, and which of them can have other dilations.

The 3×3 convs on the main paths of a residual network have Detectron2's names, such as
`res4.3.conv2`, whoever built it and wherever it lies in the module that is given: one architecture
file fits the same network of every library. All other convs larger than 1×1 are named by their path
in the module, such as `fpn_output2`. Of two residual networks in one module, both go by paths.

Patterns (`fnmatch`) match names: `res4.*`, `fpn_output*`, `*`.
"""

import difflib
import re
from fnmatch import fnmatchcase
from typing import Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import nn

from ..errors import NATSError
from .layers import GroupedDilationConv2d, MixedDilationConv2d, dilated
from .search_space import first_match

_STAGES = {alias: f"res{i}" for i in range(2, 6) for alias in (f"res{i}", f"layer{i - 1}")}
"""Detectron2 has stages res2 … res5; torchvision, timm and mmdet call them layer1 … layer4."""

_PLAIN_FORWARDS = (
    "torch.nn.modules.conv",
    "detectron2.layers.wrappers",  # its norm and activation follow
    "mmcv.cnn.bricks.wrappers",  # takes empty batches
)
"""Where the `forward` of a plain conv is defined."""


class NamedConv(NamedTuple):
    """A conv larger than 1×1, of whatever class.

    Attributes:
        path: where it lies in the module.
        why_not: why it cannot have other dilations; "" if it can.
    """

    path: str
    conv: nn.Module
    why_not: str


def named_convs(network: nn.Module) -> Dict[str, NamedConv]:
    """Name → every conv larger than 1×1, in the network's order."""
    stages = residual_stages(network)
    residual = {
        conv: f"{stage}.{name}"
        for stage, path in stages.items()
        for name, conv in _main_path(network.get_submodule(path))
    }
    convs: Dict[str, NamedConv] = {}
    owners: Dict[int, str] = {}  # of each weight
    for path, conv in network.named_modules():
        if not _is_large_conv(conv):
            continue
        name, why_not = residual.get(conv, path), _why_not(conv)
        if conv not in residual and any(path.startswith(f"{stage}.") for stage in stages.values()):
            why_not = "it lies beside the main path of a residual stage"
        owner = name if why_not else owners.setdefault(id(conv.weight), name)
        if owner != name:
            why_not = f"it shares its weight with {owner}"
            convs[owner] = convs[owner]._replace(why_not=f"it shares its weight with {name}")
        if name in convs:
            raise NATSError(f"two convs have the name {name}, at {convs[name].path} and {path}")
        convs[name] = NamedConv(path, conv, why_not)
    return convs


def searchable(
    network: nn.Module, patterns: Optional[Sequence[str]] = None
) -> Dict[str, nn.Conv2d]:
    """The convs that match a pattern and can have other dilations, or have them already.

    They do what `nn.Conv2d` does with a weight of their own, and keep the size of the map: any odd
    kernel above 1×1, any stride, conv groups, bias. :func:`named_convs` tells why others cannot.

    Args:
        network: on any device.
        patterns: of names. A conv belongs to the first that matches. None: all convs.

    Returns:
        Name → conv, in the network's order.

    Raises:
        NATSError: a pattern has no conv of its own, or takes a conv's path for its name; says what
            to write.
    """
    convs = named_convs(network)
    able = {name: conv for name, (_, conv, why_not) in convs.items() if not why_not}
    if patterns is None:
        return able
    owners = {name: first_match(name, patterns) for name in convs}
    for name, (path, _, _) in convs.items():
        if not owners[name] and first_match(path, patterns):
            raise NATSError(
                f"CONVS {first_match(path, patterns)!r} matches the path {path} of a conv whose "
                f"name is {name}: add {name.split('.')[0] + '.*'!r}, or leave this path out"
            )
    for pattern in patterns:
        if pattern not in {owners[name] for name in able}:
            raise NATSError(
                f"CONVS {pattern!r} matches no conv that can be searched: "
                f"{_why_none(pattern, convs, owners)}"
            )
    return {name: conv for name, conv in able.items() if owners[name]}


def _why_none(pattern: str, convs: Mapping[str, NamedConv], owners: Mapping[str, str]) -> str:
    matching = [name for name in convs if fnmatchcase(name, pattern)]
    unable = [f"{name}: {convs[name].why_not}" for name in matching if convs[name].why_not]
    if unable:
        return "; ".join(unable[:3])
    if matching:
        return f"{matching[0]} belongs to {owners[matching[0]]!r}, which comes first"
    return f"near are {near_names(pattern, convs) or 'none, as it has none larger than 1x1'}"


def near_names(name: str, convs: Mapping[str, NamedConv]) -> str:
    """Up to five kinds of names most like `name`: "res3.*.conv2, res4.*.conv2"."""
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", other) for other in convs))
    return ", ".join(difflib.get_close_matches(name, kinds, 5, 0.3) or kinds[:5])


def searched_layers(module: nn.Module) -> Dict[str, MixedDilationConv2d]:
    """Name → searched conv of a super-network (empty for a plain or frozen network).

    The names are those that :func:`.to_supernet` gave, wherever in `module` its network lies.
    """
    convs = [conv for conv in module.modules() if isinstance(conv, MixedDilationConv2d)]
    layers = {conv.layer: conv for conv in convs}
    if len(layers) < len(convs):
        raise NATSError("two super-networks in one module: pass the one that is searched")
    return layers


def residual_stages(network: nn.Module) -> Dict[str, str]:
    """Stage name, "res2" to "res5" → path, of each residual stage that the module has once.

    A stage is an `nn.Sequential` named as Detectron2, torchvision, timm or mmdet name theirs, whose
    blocks all have parts conv1 and conv2, 3×3 convs among them. (An FPN keeps it under `bottom_up`
    or `body`.)
    """
    paths: Dict[str, List[str]] = {}
    inside: Tuple[str, ...] = ()
    for path, part in network.named_modules():
        stage = _STAGES.get(path.rsplit(".", 1)[-1])
        if stage and not path.startswith(inside) and any(True for _ in _main_path(part)):
            paths.setdefault(stage, []).append(path)
            inside += (f"{path}.",)
    return {stage: paths[stage][0] for stage in sorted(paths) if len(paths[stage]) == 1}


def _main_path(stage: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    """("3.conv2", conv) of each 3×3 conv on a stage's main path; none where it is no stage."""
    blocks = list(stage) if isinstance(stage, nn.Sequential) else []
    if all({"conv1", "conv2"} <= dict(block.named_children()).keys() for block in blocks):
        for index, block in enumerate(blocks):
            # conv1 and conv2 of a basic block, conv2 of a bottleneck. A deformable conv's offsets
            # (`conv2_offset`) are no part of the main path.
            for part in ("conv1", "conv2"):
                conv = getattr(block, part)
                if getattr(conv, "kernel_size", None) in (3, (3, 3)):
                    yield f"{index}.{part}", conv


def _is_large_conv(part: nn.Module) -> bool:
    kernel = getattr(part, "kernel_size", 1)
    if isinstance(part, nn.modules.conv._ConvTransposeNd) or kernel in (1, (1, 1)):
        return False
    weight = getattr(part, "weight", None)
    return torch.is_tensor(weight) and weight.ndim == 4


def _why_not(conv: nn.Module) -> str:
    """Why a conv cannot have another dilation, as far as it tells itself; "" if it can."""
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
    try:
        dilated(conv)
    except NATSError as error:
        return str(error)
    return ""
