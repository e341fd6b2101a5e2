"""Change a network's convs in place: plain → super-network, plain → frozen.

Knows modules, not configs. Works on any network, such as a ResNet of Detectron2, torchvision, timm
or mmdet, an FPN around one, a whole detector, a LazyConfig model; :mod:`.names` says which convs.
"""

import logging
from typing import Dict, List, Mapping, Sequence, Union

import torch
from torch import nn

from ..errors import NATSError
from .architecture import Architecture, check_name
from .decode import merged
from .layers import GroupedDilationConv2d, MixedDilationConv2d, dilated
from .names import NamedConv, named_convs, near_names, searchable, searched_layers
from .sampling import SampledDilationConv2d
from .search_space import Dilation, SearchSpace, first_match, stage_of

logger = logging.getLogger(__name__)


def to_supernet(backbone: nn.Module, space: SearchSpace) -> nn.Module:
    """Make every searched conv a :class:`MixedDilationConv2d`, in place (section 3.2).

    Convs that match and cannot be searched, or are frozen, are left alone; a warning names them.

    Args:
        backbone: plain. Weights already loaded are kept.
        space: which convs, genotypes and groups.

    Returns:
        `backbone` itself.

    Raises:
        NATSError: a pattern has nothing to search; groups do not fit. Nothing has been changed
            then.
    """
    convs = named_convs(backbone)
    left = {k: why for k, (_, _, why) in convs.items() if why and first_match(k, space.convs)}
    kind = SampledDilationConv2d if space.sample else MixedDilationConv2d
    swaps: Dict[nn.Conv2d, nn.Conv2d] = {}
    searched = []
    for name, conv in searchable(backbone, space.convs).items():
        check_name(name)  # now, and not when days of search are to be written
        _check_plain(name, conv)
        genotypes = space.genotypes_of(name, conv.kernel_size)
        if not conv.weight.requires_grad:
            left[name] = "it is frozen (takes no gradient)"
        elif len(genotypes) == 1 and 1 in conv.kernel_size:
            left[name] = f"a kernel {conv.kernel_size} cannot tell its dilations apart"
        else:
            num_groups = space.groups_of(name, conv.out_channels, conv.groups)
            options = {} if space.sample else {"share_weights": space.share_weights}
            swaps[conv] = kind(conv, genotypes=genotypes, num_groups=num_groups, **options)
            swaps[conv].layer = name
            searched.append(first_match(name, space.convs))
    for pattern in space.convs:
        if pattern not in searched:
            reasons = [f"{k}: {why}" for k, why in left.items() if first_match(k, [pattern])]
            raise NATSError(
                f"CONVS {pattern!r}: nothing to search: {'; '.join(reasons[:3])}. Take it out of "
                "MODEL.NATS.CONVS, or train these convs (MODEL.BACKBONE.FREEZE_AT)"
            )
    for conv, new in swaps.items():
        _turn_into(conv, new)
    _warn_of(left)
    return backbone


def _check_plain(name: str, conv: nn.Module) -> None:
    changed = isinstance(conv, (MixedDilationConv2d, GroupedDilationConv2d))
    if changed or hasattr(conv, "plain_dilation"):
        raise NATSError(f"{name} is searched or dilated already: start from the plain network")


def _turn_into(conv: nn.Conv2d, other: nn.Conv2d) -> None:
    """Make a conv what `other` is, in place: whoever holds it calls the new one. Its hooks stay.

    Putting `other` where the conv is registered would not do: Detectron2's FPN calls its convs from
    a list of its own.
    """
    hooks = {name: value for name, value in vars(conv).items() if "hook" in name}
    conv.__dict__ = {**vars(other), **hooks}
    conv.__class__ = type(other)


def _warn_of(left: Mapping[str, str]) -> None:
    if left:
        logger.warning(f"left as they are: {_listed([f'{k} ({why})' for k, why in left.items()])}")


def apply_architecture(backbone: nn.Module, architecture: Union[Architecture, str]) -> nn.Module:
    """Give every conv that `architecture` names its dilations, in place.

    A conv of several dilations becomes a :class:`GroupedDilationConv2d`. One of a single dilation
    stays the conv that it is, with that dilation and padding.

    Args:
        backbone: plain; the network that the architecture is of, or a module that holds it, such as
            a whole detector.
        architecture: an architecture or the path of an architecture file.

    Returns:
        `backbone` itself; state-dict keys, shapes, parameters and FLOPs are unchanged.

    Raises:
        NATSError: the architecture does not fit; names the layers. Nothing has been changed then.
    """
    if not isinstance(architecture, Architecture):
        architecture = Architecture.load(architecture)
    convs = named_convs(backbone)
    present = _present(backbone, convs, list(architecture.layers))
    swaps: Dict[nn.Conv2d, nn.Conv2d] = {}
    single: Dict[nn.Conv2d, Dilation] = {}
    for name, segments in architecture.layers.items():
        conv = present[name]
        _check_plain(name, conv)
        if conv in swaps or conv in single:
            raise NATSError(f"the architecture names the conv {name} twice, once by its path")
        try:
            frozen = GroupedDilationConv2d(conv, segments)
        except NATSError as error:
            raise NATSError(f"the architecture does not fit {name}: {error}") from None
        if len(frozen.segments) == 1:
            single[conv] = frozen.segments[0][1:]
        else:
            swaps[conv] = frozen
    for conv, dilation in single.items():
        _dilate(conv, dilation)
    for conv, new in swaps.items():
        _turn_into(conv, new)
    stages = architecture.stages
    _warn_of({k: why for k, (_, _, why) in convs.items() if why and stage_of(k) in stages})
    return backbone


def _dilate(conv: nn.Conv2d, genotype: Dilation) -> None:
    """Give a plain conv one dilation. It keeps its class, which fusers and exporters know."""
    conv.plain_dilation = conv.dilation  # says that it is no longer the plain network's
    if genotype != (1, 1):
        conv.dilation, conv.padding = dilated(conv, genotype)
        conv._reversed_padding_repeated_twice = [p for p in conv.padding[::-1] for _ in range(2)]


def _present(
    network: nn.Module, convs: Mapping[str, NamedConv], names: Sequence[str]
) -> Dict[str, nn.Conv2d]:
    """Layer name → conv, of an architecture's names.

    Names that are paths hold in the network, or in the one part of it that has them all. Files of
    before named residual networks' convs by paths, too.
    """
    by_path = {named.path: named for named in convs.values()}
    paths = [name for name in names if not stage_of(name)]
    parts = [""] + [f"{part}." for part, _ in network.named_modules() if part]
    fitting = [part for part in parts if all(part + path in by_path for path in paths)]
    part = fitting[0] if len(fitting) == 1 else ""
    present = {path: by_path[part + path] for path in paths if part + path in by_path}
    present.update({name: convs[name] for name in names if stage_of(name) and name in convs})
    unable = [f"{name}: {present[name].why_not}" for name in present if present[name].why_not]
    unknown = [name for name in names if name not in present]
    stages = {stage_of(name) for name in names} - {""}
    missing = [
        name
        for name, (_, _, why_not) in convs.items()
        if stage_of(name) in stages and name not in names and not why_not
    ]
    problems = unable[:3]
    if unknown:
        near = near_names(unknown[0], convs) or "none"
        problems.append(f"the network lacks {_listed(unknown)}: near are {near}")
    if missing:
        problems.append(
            f"it does not name {_listed(missing)}, and must name every 3x3 conv of each stage that "
            f"it changes: {missing[0]}: [[{convs[missing[0]].conv.out_channels}, 1, 1]] leaves one "
            "plain"
        )
    if problems:
        raise NATSError(
            f"the architecture does not fit: {'; '.join(problems)}. Take one that was searched on "
            "this network"
        )
    return {name: named.conv for name, named in present.items()}


def _listed(names: List[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def frozen_state_dict(supernet: nn.Module, architecture: Architecture) -> Dict[str, torch.Tensor]:
    """A super-network's own weights as the state dict of the frozen network (voted order).

    Each output channel takes its row from the replica of the dilation that it was given.

    Args:
        supernet: a whole detector, or its backbone.
        architecture: decoded from it in voted order, or of its search space and never decoded.

    Raises:
        NATSError: `architecture` is in paper order, not in the search space, or another than the
            one that a run froze and went on to train.
    """
    if architecture.search.get("order") == "paper":
        raise NATSError(
            "the super-network's weights fit only an architecture in voted order (in paper order "
            "a channel's dilation is not the one that its weights were trained under)"
        )
    frozen = dict(supernet.state_dict())
    paths = {module: path for path, module in supernet.named_modules()}
    for name, conv in searched_layers(supernet).items():
        for part in ("alpha", "replicas", "choice"):
            frozen.pop(f"{paths[conv]}.{part}", None)
        segments = architecture.layers.get(name, ())
        dilations = {tuple(dilation) for _, *dilation in segments}
        if sum(c for c, *_ in segments) != conv.out_channels or dilations - {*conv.genotypes}:
            raise NATSError(
                f"{name}: the architecture has {segments}, the super-network {conv.out_channels} "
                f"channels with dilations of {list(conv.genotypes)}"
            )
        settled = getattr(conv, "settled", None)
        if settled and settled != tuple(merged(segments)):
            raise NATSError(
                f"{name}: this run froze {list(settled)} and went on to train it; its weights do "
                f"not suit {list(segments)}"
            )
        weights = dict(zip(conv.genotypes, conv.genotype_weights()))
        pieces, start = [], 0
        for channels, *dilation in segments:
            pieces.append(weights[tuple(dilation)].detach()[start : start + channels])
            start += channels
        frozen[f"{paths[conv]}.weight"] = torch.cat(pieces)
    return frozen
