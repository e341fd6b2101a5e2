"""Swap a residual network's 3×3 convs in place: plain → super-network, plain → frozen.

Knows modules, not configs. Works on anything that holds residual stages (:mod:`.stages`): a ResNet
of Detectron2, torchvision, timm or mmdet, an FPN around one, a whole detector, a LazyConfig model.
"""

import logging
from typing import Dict, Union

import torch
from torch import nn

from ..errors import NATSError
from .architecture import Architecture
from .layers import GroupedDilationConv2d, MixedDilationConv2d
from .sampling import SampledDilationConv2d
from .search_space import SearchSpace
from .stages import named_convs, other_convs, residual_stages, searched_layers, what_is_in

logger = logging.getLogger(__name__)


def _check_plain(name: str, conv: nn.Module) -> None:
    if isinstance(conv, (MixedDilationConv2d, GroupedDilationConv2d)):
        raise NATSError(f"{name} is a {type(conv).__name__} already: start from the plain backbone")


def to_supernet(backbone: nn.Module, space: SearchSpace) -> nn.Module:
    """Make every searched conv a :class:`MixedDilationConv2d`, in place (section 3.2).

    Args:
        backbone: holds plain residual stages (:func:`.stages.residual_stages`); weights already
            loaded are kept.
        space: which stages, genotypes and groups.

    Returns:
        `backbone` itself.

    Raises:
        NATSError: a stage is missing, frozen, or has nothing to search; groups do not fit.
            Nothing has been changed then.
    """
    stages = residual_stages(backbone)
    swaps = []
    for stage_name in space.stages:
        if stage_name not in stages:
            raise NATSError(
                f"stage {stage_name} is missing: this backbone builds {', '.join(stages)}; take "
                f"{stage_name} out of the stages (MODEL.NATS.STAGES)"
            )
        found = list(named_convs(stage_name, stages[stage_name]))
        if not found:
            raise NATSError(
                f"stage {stage_name} has no plain 3x3 conv to search (deformable convs are left "
                f"alone): take {stage_name} out of MODEL.NATS.STAGES. It holds "
                f"{what_is_in(stages[stage_name])}"
            )
        for name, block, attribute in found:
            conv = getattr(block, attribute)
            _check_plain(name, conv)
            if not conv.weight.requires_grad:
                raise NATSError(
                    f"stage {stage_name} is frozen ({name} takes no gradient): lower "
                    f"MODEL.BACKBONE.FREEZE_AT or take {stage_name} out of MODEL.NATS.STAGES"
                )
            num_groups = space.groups_of(name, conv.out_channels, conv.groups)
            choice = {"genotypes": space.genotypes[stage_name], "num_groups": num_groups}
            if space.sample:
                mixed = SampledDilationConv2d(conv, **choice)
            else:
                mixed = MixedDilationConv2d(conv, share_weights=space.share_weights, **choice)
            swaps.append((block, attribute, mixed))
    for block, attribute, mixed in swaps:
        setattr(block, attribute, mixed)
    _warn_of_others({name: stages[name] for name in space.stages})
    return backbone


def _warn_of_others(stages: Dict[str, nn.Module]) -> None:
    others: Dict[str, str] = {}
    for name, stage in stages.items():
        others.update(other_convs(name, stage))
    if others:
        listed = ", ".join(f"{name} ({kind})" for name, kind in others.items())
        logger.warning(f"left as they are, since only plain convs are understood: {listed}")


def apply_architecture(backbone: nn.Module, architecture: Union[Architecture, str]) -> nn.Module:
    """Make every 3×3 conv that `architecture` names a :class:`GroupedDilationConv2d`, in place.

    Args:
        backbone: any module that holds plain residual stages, a whole detector too.
        architecture: an architecture or the path of an architecture file.

    Returns:
        `backbone` itself; state-dict keys, shapes, parameters and FLOPs are unchanged.

    Raises:
        NATSError: the architecture does not fit; names the layers. Nothing has been changed then.
    """
    if not isinstance(architecture, Architecture):
        architecture = Architecture.load(architecture)
    present, without = {}, []
    for stage_name, stage in residual_stages(backbone).items():
        found = {name: place for name, *place in named_convs(stage_name, stage)}
        present.update(found)
        if stage_name in architecture.stages:
            if not found:
                without.append(f". {stage_name} holds {what_is_in(stage)}")
            without += [f". {n}: {kind}" for n, kind in other_convs(stage_name, stage).items()][:3]
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
    swaps = []
    for name, segments in architecture.layers.items():
        block, attribute = present[name]
        conv = getattr(block, attribute)
        _check_plain(name, conv)
        try:
            swaps.append((block, attribute, GroupedDilationConv2d(conv, segments)))
        except NATSError as error:
            raise NATSError(f"the architecture does not fit {name}: {error}") from None
    for block, attribute, grouped in swaps:
        setattr(block, attribute, grouped)
    stages = residual_stages(backbone)
    _warn_of_others({name: stages[name] for name in architecture.stages})
    return backbone


def frozen_state_dict(supernet: nn.Module, architecture: Architecture) -> Dict[str, torch.Tensor]:
    """A super-network's own weights as the state dict of the frozen network (voted order).

    Each output channel takes its row from the replica of the dilation that it was given.

    Args:
        supernet: a whole detector, or its backbone.
        architecture: decoded from it in voted order, or of its search space and never decoded.

    Raises:
        NATSError: `architecture` is in paper order, or not in the search space.
    """
    if architecture.search.get("order") == "paper":
        raise NATSError(
            "the super-network's weights fit only an architecture in voted order (in paper order "
            "a channel's dilation is not the one that its weights were trained under)"
        )
    frozen = dict(supernet.state_dict())
    paths = {module: path for path, module in supernet.named_modules()}
    for name, conv in searched_layers(supernet).items():
        for part in ("alpha", "replicas"):
            frozen.pop(f"{paths[conv]}.{part}", None)
        segments = architecture.layers.get(name, ())
        dilations = {tuple(dilation) for _, *dilation in segments}
        if sum(c for c, *_ in segments) != conv.out_channels or dilations - {*conv.genotypes}:
            raise NATSError(
                f"{name}: the architecture has {segments}, the super-network {conv.out_channels} "
                f"channels with dilations of {list(conv.genotypes)}"
            )
        frozen[f"{paths[conv]}.weight"] = conv.frozen_weight(segments)
    return frozen
