"""Change a network's convs in place: plain → super-network, plain → frozen.

Knows modules, not configs. Works on anything that holds residual stages (:mod:`.stages`), such as a
ResNet of Detectron2, torchvision, timm or mmdet, an FPN around one, a whole detector, a LazyConfig
model; and on any convs of any network, named by patterns (:mod:`.convs`).
"""

import logging
from typing import Dict, Mapping, Sequence, Tuple, Union

import torch
from torch import nn

from ..errors import NATSError
from .architecture import Architecture, check_name
from .convs import convs_by_path, matching_convs, near_paths, searched_layers, turn_into
from .layers import GroupedDilationConv2d, MixedDilationConv2d, merged, same_padding
from .sampling import SampledDilationConv2d
from .search_space import Dilation, SearchSpace
from .stages import named_convs, other_convs, residual_stages, what_is_in

logger = logging.getLogger(__name__)


def _check_plain(name: str, conv: nn.Module) -> None:
    if isinstance(conv, (MixedDilationConv2d, GroupedDilationConv2d)):
        raise NATSError(f"{name} is a {type(conv).__name__} already: start from the plain backbone")
    if hasattr(conv, "plain_dilation"):
        raise NATSError(f"{name} has its dilation by an architecture already: start from the plain")


def to_supernet(backbone: nn.Module, space: SearchSpace) -> nn.Module:
    """Make every searched conv a :class:`MixedDilationConv2d`, in place (section 3.2).

    Args:
        backbone: plain; holds residual stages (:func:`.stages.residual_stages`); or with
            `space.convs`, any network. Weights already loaded are kept.
        space: which convs, genotypes and groups.

    Returns:
        `backbone` itself.

    Raises:
        NATSError: a stage is missing, frozen, or has nothing to search; a pattern matches nothing
            that can be searched; groups do not fit. Nothing has been changed then.
    """
    found, others = _searched(backbone, space)
    swaps: Dict[nn.Conv2d, nn.Conv2d] = {}
    for name, conv in found.items():
        check_name(name, bool(space.convs))  # now, and not when days of search are to be written
        _check_plain(name, conv)
        choice = {
            "genotypes": space.genotypes_of(name, conv.kernel_size),
            "num_groups": space.groups_of(name, conv.out_channels, conv.groups),
        }
        if space.sample:
            mixed = SampledDilationConv2d(conv, **choice)
        else:
            mixed = MixedDilationConv2d(conv, share_weights=space.share_weights, **choice)
        mixed.layer, mixed.by_path = name, bool(space.convs)
        swaps[conv] = mixed
    for conv, new in swaps.items():
        turn_into(conv, new)
    _warn_of_others(others)
    return backbone


def _searched(
    network: nn.Module, space: SearchSpace
) -> Tuple[Dict[str, nn.Conv2d], Dict[str, str]]:
    """Layer name → conv to search; and of others that were asked for, layer name → why not."""
    if space.convs:
        found, others = matching_convs(network, space.convs)
        for path, conv in list(found.items()):
            if not conv.weight.requires_grad:
                others[path] = "it is frozen (takes no gradient)"
            elif len(space.genotypes_of(path, conv.kernel_size)) == 1:
                others[path] = f"a kernel {conv.kernel_size} cannot tell its dilations apart"
            if path in others:
                del found[path]
        if not found:
            reasons = "; ".join(f"{path}: {why}" for path, why in list(others.items())[:3])
            raise NATSError(f"CONVS {list(space.convs)}: nothing to search: {reasons}")
        return found, others
    stages = residual_stages(network)
    found = {}
    for stage in space.stages:
        if stage not in stages:
            raise NATSError(
                f"stage {stage} is missing: this backbone builds {', '.join(stages)}; take "
                f"{stage} out of the stages (MODEL.NATS.STAGES)"
            )
        convs = named_convs(stage, stages[stage])
        if not convs:
            raise NATSError(
                f"stage {stage} has no plain 3x3 conv to search (deformable convs are left "
                f"alone): take {stage} out of MODEL.NATS.STAGES. It holds "
                f"{what_is_in(stages[stage])}"
            )
        frozen = [name for name, conv in convs.items() if not conv.weight.requires_grad]
        if frozen:
            raise NATSError(
                f"stage {stage} is frozen ({frozen[0]} takes no gradient): lower "
                f"MODEL.BACKBONE.FREEZE_AT or take {stage} out of MODEL.NATS.STAGES"
            )
        found.update(convs)
    return found, other_convs({stage: stages[stage] for stage in space.stages})


def _warn_of_others(others: Mapping[str, str]) -> None:
    if others:
        listed = ", ".join(f"{name} ({why})" for name, why in list(others.items())[:20])
        more = f" and {len(others) - 20} more" if len(others) > 20 else ""
        logger.warning(f"left as they are, since only plain convs are understood: {listed}{more}")


def apply_architecture(backbone: nn.Module, architecture: Union[Architecture, str]) -> nn.Module:
    """Give every conv that `architecture` names its dilations, in place.

    A conv of several dilations becomes a :class:`GroupedDilationConv2d`. One of a single dilation
    stays the conv that it is, with that dilation and padding.

    Args:
        backbone: plain; any module that holds residual stages, a whole detector too. Where the
            architecture's names are paths, the network that was searched.
        architecture: an architecture or the path of an architecture file.

    Returns:
        `backbone` itself; state-dict keys, shapes, parameters and FLOPs are unchanged.

    Raises:
        NATSError: the architecture does not fit; names the layers. Nothing has been changed then.
    """
    if not isinstance(architecture, Architecture):
        architecture = Architecture.load(architecture)
    present, others = _named_convs(backbone, architecture)
    swaps: Dict[nn.Conv2d, nn.Conv2d] = {}
    single: Dict[nn.Conv2d, Dilation] = {}
    for name, segments in architecture.layers.items():
        conv = present[name]
        _check_plain(name, conv)
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
        turn_into(conv, new)
    _warn_of_others(others)
    return backbone


def _dilate(conv: nn.Conv2d, genotype: Dilation) -> None:
    """Give a plain conv one dilation. It keeps its class, which fusers and exporters know."""
    padding = same_padding(conv, genotype)
    conv.plain_dilation = conv.dilation  # says that it is no longer the plain network's
    if genotype != (1, 1):
        conv.dilation = tuple(d * g for d, g in zip(conv.dilation, genotype))
        conv.padding = padding
        conv._reversed_padding_repeated_twice = [p for p in padding[::-1] for _ in range(2)]


def _named_convs(
    network: nn.Module, architecture: Architecture
) -> Tuple[Dict[str, nn.Conv2d], Dict[str, str]]:
    """Layer name → conv, of all that the architecture names; and others beside them → why not."""
    if architecture.paths:
        return _convs_at_paths(network, list(architecture.layers)), {}
    present: Dict[str, nn.Conv2d] = {}
    without, stages = [], residual_stages(network)
    changed = {name: stages[name] for name in architecture.stages if name in stages}
    others = other_convs(changed)
    for stage_name, stage in stages.items():
        found = named_convs(stage_name, stage)
        present.update(found)
        if stage_name in changed:
            if not found:
                without.append(f". {stage_name} holds {what_is_in(stage)}")
            left = [name for name in others if name.split(".")[0] == stage_name]
            without += [f". {name}: {others[name]}" for name in left[:3]]
    unknown = [name for name in architecture.layers if name not in present]
    missing = [
        name
        for name in present
        if name.split(".")[0] in architecture.stages and name not in architecture.layers
    ]
    if unknown or missing:
        problems = []
        for problem, names in (
            ("the backbone lacks", unknown),
            ("the architecture does not name", missing),
        ):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                problems.append(f"{problem} {', '.join(names[:5])}{more}")
        raise NATSError(
            f"the architecture does not fit: {'; '.join(problems)}. It must name every 3x3 conv of "
            "each stage that it changes: take one that was searched on this backbone"
            + "".join(without)
        )
    return present, others


def _convs_at_paths(network: nn.Module, paths: Sequence[str]) -> Dict[str, nn.Conv2d]:
    able, others = convs_by_path(network)
    unknown = [path for path in paths if path not in able]
    if not unknown:
        return able
    inside = [
        part
        for part, _ in network.named_modules()
        if part and all(f"{part}.{path}" in able for path in paths)
    ]
    if unknown[0] in others:
        cure = f": {others[unknown[0]]}"
    elif inside:
        cure = f": it fits the part {inside[0]}, pass that"
    else:
        cure = f": near are {', '.join(near_paths(unknown[0], able)) or 'none'}"
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    raise NATSError(
        f"the architecture does not fit: the network lacks a conv {', '.join(unknown[:5])}{more}"
        f"{cure}. Its names are paths in the network that was searched"
    )


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
        frozen[f"{paths[conv]}.weight"] = conv.frozen_weight(segments)
    return frozen
