"""Walk a backbone and swap its 3×3 convs in place: plain → super-network, plain → frozen.

Knows modules, not configs. Works on anything that holds residual stages made of Detectron2's
blocks (`res2` … `res5`): a ResNet, an FPN around one, a whole detector, a LazyConfig model.
"""

from typing import Dict, Iterator, Tuple, Union

from torch import nn

from detectron2.layers import CNNBlockBase

from .architecture import Architecture
from .errors import NATSError
from .layers import GroupedDilationConv2d, MixedDilationConv2d
from .search_space import PAPER_SETS, SearchSpace

__all__ = ["apply_architecture", "conv3x3_layers", "searched_layers", "to_supernet"]

_STAGES = tuple(PAPER_SETS["C"])


def residual_stages(module: nn.Module) -> Dict[str, nn.Module]:
    """Stage name → stage, wherever it lies (an FPN keeps it under `bottom_up`)."""
    stages: Dict[str, nn.Module] = {}
    for path, child in module.named_modules():
        name = path.rsplit(".", 1)[-1]
        is_stage = name in _STAGES and isinstance(child, nn.Sequential)
        if is_stage and all(isinstance(block, CNNBlockBase) for block in child):
            if name in stages:
                raise NATSError(
                    f"found two stages {name}, the second at {path}: pass one residual network"
                )
            stages[name] = child
    if not stages:
        raise NATSError(
            f"{type(module).__name__} has no residual stages (res2 to res5, made of Detectron2's "
            "blocks): choose a ResNet as the base backbone"
        )
    return dict(sorted(stages.items()))


def _named_convs(stage_name: str, stage: nn.Module) -> Iterator[Tuple[str, nn.Module, str]]:
    """(layer name, block, attribute) of each 3×3 conv on a stage's main path."""
    for index, block in enumerate(stage):
        # conv1 and conv2 of a basic block, conv2 of a bottleneck. Deformable convs are not
        # nn.Conv2d, and their offsets (`conv2_offset`) are no part of the main path.
        for attribute in ("conv1", "conv2"):
            conv = getattr(block, attribute, None)
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                yield f"{stage_name}.{index}.{attribute}", block, attribute


def conv3x3_layers(module: nn.Module) -> Dict[str, nn.Conv2d]:
    """Layer name → every 3×3 conv of the residual stages, in order; plain or swapped."""
    return {
        name: getattr(block, attribute)
        for stage_name, stage in residual_stages(module).items()
        for name, block, attribute in _named_convs(stage_name, stage)
    }


def searched_layers(module: nn.Module) -> Dict[str, MixedDilationConv2d]:
    """Layer name → searched conv of a super-network (empty for a plain or frozen network)."""
    layers = conv3x3_layers(module)
    return {k: v for k, v in layers.items() if isinstance(v, MixedDilationConv2d)}


def _check_plain(name: str, conv: nn.Module) -> None:
    if isinstance(conv, (MixedDilationConv2d, GroupedDilationConv2d)):
        raise NATSError(f"{name} is a {type(conv).__name__} already: start from the plain backbone")


def to_supernet(backbone: nn.Module, space: SearchSpace) -> nn.Module:
    """Make every searched conv a :class:`MixedDilationConv2d`, in place (section 3.2).

    Args:
        backbone: holds plain residual stages; weights already loaded are kept.
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
                f"{stage_name} out of MODEL.NATS.STAGES"
            )
        found = list(_named_convs(stage_name, stages[stage_name]))
        if not found:
            raise NATSError(
                f"stage {stage_name} has no plain 3x3 conv to search (deformable convs are left "
                f"alone): take {stage_name} out of MODEL.NATS.STAGES"
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
            mixed = MixedDilationConv2d(
                conv,
                genotypes=space.genotypes[stage_name],
                num_groups=num_groups,
                share_weights=space.share_weights,
            )
            swaps.append((block, attribute, mixed))
    for block, attribute, mixed in swaps:
        setattr(block, attribute, mixed)
    return backbone


def apply_architecture(backbone: nn.Module, architecture: Union[Architecture, str]) -> nn.Module:
    """Make every 3×3 conv that `architecture` names a :class:`GroupedDilationConv2d`, in place.

    Args:
        backbone: any module that holds plain residual stages, a whole LazyConfig detector too.
        architecture: an architecture or the path of an architecture file.

    Returns:
        `backbone` itself; state-dict keys, shapes, parameters and FLOPs are unchanged.

    Raises:
        NATSError: the architecture does not fit; names the layers. Nothing has been changed then.
    """
    if not isinstance(architecture, Architecture):
        architecture = Architecture.load(architecture)
    present = {}
    for stage_name, stage in residual_stages(backbone).items():
        for name, block, attribute in _named_convs(stage_name, stage):
            present[name] = block, attribute
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
        )
    swaps = []
    for name, runs in architecture.layers.items():
        block, attribute = present[name]
        conv = getattr(block, attribute)
        _check_plain(name, conv)
        try:
            swaps.append((block, attribute, GroupedDilationConv2d(conv, runs)))
        except NATSError as error:
            raise NATSError(f"the architecture does not fit {name}: {error}") from None
    for block, attribute, grouped in swaps:
        setattr(block, attribute, grouped)
    return backbone
