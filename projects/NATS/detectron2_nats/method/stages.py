"""Where a residual network's stages and 3×3 convs are, whoever built it.

Detectron2 calls the stages `res2` … `res5`; torchvision, timm and mmdet call them `layer1` …
`layer4`. They are told by their structure: an `nn.Sequential` of that name whose blocks all have
parts named `conv1` and `conv2`. Here they have Detectron2's names, and so in architecture files:
one file fits the same network of every library. Other networks' convs go by their paths
(:mod:`.convs`).
"""

from typing import Dict, Iterator, Tuple

from torch import nn

from ..errors import NATSError
from .convs import is_plain_conv, why_not

_STAGES = {alias: f"res{i}" for i in range(2, 6) for alias in (f"res{i}", f"layer{i - 1}")}


def residual_stages(module: nn.Module) -> Dict[str, nn.Sequential]:
    """Stage name → stage, wherever it lies (an FPN keeps it under `bottom_up` or `body`).

    Raises:
        NATSError: there is none, or there are two networks; lists what was found.
    """
    stages: Dict[str, nn.Sequential] = {}
    paths: Dict[str, str] = {}
    others = []
    for path, child in module.named_modules():
        name = _STAGES.get(path.rsplit(".", 1)[-1])
        if name is None or any(path.startswith(f"{stage}.") for stage in paths.values()):
            continue
        if not _is_stage(child):
            others.append(f"{path}, {what_is_in(child)}")
        elif name in stages:
            raise NATSError(
                f"found two stages {name}, the second at {path}: pass one residual network, such "
                f"as the module that holds {paths[name]}"
            )
        else:
            stages[name], paths[name] = child, path
    if not stages:
        parts = ", ".join(name for name, _ in module.named_children()) or "no parts"
        raise NATSError(
            f"{type(module).__name__} has no residual stages (res2 to res5 or layer1 to layer4, "
            "nn.Sequentials of blocks with convs conv1 and conv2): choose a ResNet as the base "
            "backbone, or name convs by patterns (CONVS, --convs). Found: "
            f"{'; '.join(others[:5]) or parts}"
        )
    return dict(sorted(stages.items()))


def _is_stage(module: nn.Module) -> bool:
    if not isinstance(module, nn.Sequential) or not len(module):
        return False
    return all(
        {"conv1", "conv2"} <= {name for name, _ in block.named_children()} for block in module
    )


def what_is_in(stage: nn.Module) -> str:
    """For a message: the kinds of its blocks and of their convs."""
    if not isinstance(stage, nn.Sequential) or not len(stage):
        return type(stage).__name__
    block = stage[-1]
    parts = [
        f"{name} {type(part).__name__}{tuple(getattr(part, 'kernel_size', ()))}"
        for name, part in block.named_children()
        if name.startswith("conv")
    ]
    return f"blocks {type(block).__name__} with {', '.join(parts) or 'no convs'}"


def _main_path(stage_name: str, stage: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    """(layer name, conv) of each 3×3 conv on a stage's main path, of whatever class."""
    for index, block in enumerate(stage):
        # conv1 and conv2 of a basic block, conv2 of a bottleneck. A deformable conv's offsets
        # (`conv2_offset`) are no part of the main path.
        for attribute in ("conv1", "conv2"):
            conv = getattr(block, attribute)
            if getattr(conv, "kernel_size", None) in (3, (3, 3)):
                yield f"{stage_name}.{index}.{attribute}", conv


def named_convs(stage_name: str, stage: nn.Module) -> Dict[str, nn.Conv2d]:
    """Layer name → each plain 3×3 conv on a stage's main path, or what replaced it."""
    return {name: conv for name, conv in _main_path(stage_name, stage) if is_plain_conv(conv)}


def other_convs(stages: Dict[str, nn.Module]) -> Dict[str, str]:
    """Layer name → why not, of each 3×3 conv on the stages' main paths that cannot be changed."""
    return {
        name: why_not(conv)
        for stage_name, stage in stages.items()
        for name, conv in _main_path(stage_name, stage)
        if not is_plain_conv(conv)
    }


def conv3x3_layers(module: nn.Module) -> Dict[str, nn.Conv2d]:
    """Layer name → every plain 3×3 conv of the residual stages, in order; or what replaced it."""
    return {
        name: conv
        for stage_name, stage in residual_stages(module).items()
        for name, conv in named_convs(stage_name, stage).items()
    }
