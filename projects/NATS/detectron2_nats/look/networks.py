"""torchvision's and timm's networks by name, without Detectron2."""

import importlib
import os
from typing import Dict

import torch
from torch import nn

from ..errors import NATSError, one_line

LIBRARIES = ("torchvision", "timm")


def build_network(name: str, device: str = "cpu") -> nn.Module:
    """A network with weights drawn at random; nothing is downloaded.

    Args:
        name: "torchvision:resnet50", also a detector such as
            "torchvision:fasterrcnn_resnet50_fpn"; or "timm:resnet50d".
        device: "meta" where shapes are enough.

    Raises:
        NATSError: unknown, or its library is not installed.
    """
    library, _, model = name.partition(":")
    if library not in LIBRARIES or not model:
        raise NATSError(f"network {name!r}: expected torchvision:NAME or timm:NAME")
    try:
        package = importlib.import_module(library)
    except ImportError:
        raise NATSError(f"network {name}: {library} is not installed here") from None
    try:
        with torch.device(device):
            if library == "timm":
                return package.create_model(model, pretrained=False)
            models = importlib.import_module("torchvision.models")
            try:  # a detector's backbone would be downloaded
                return models.get_model(model, weights=None, weights_backbone=None)
            except TypeError:  # a classifier has none
                return models.get_model(model, weights=None)
    except (RuntimeError, ValueError) as error:
        raise NATSError(f"network {name}: {library} cannot build it: {one_line(error)}") from None


def load_weights(network: nn.Module, path: str) -> float:
    """Load a state dict, as it is or under "model" or "state_dict"; returns the share of the
    network's tensors that it held.

    Raises:
        NATSError: it cannot be read, holds less than half of them, or convs of other shapes.
    """
    if not os.path.isfile(path):
        raise NATSError(f"weights {path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("model", "state_dict"):
            content = content.get(key, content)
        given: Dict[str, torch.Tensor] = {k.removeprefix("module."): v for k, v in content.items()}
        own = network.state_dict()
        common = {k: v for k, v in given.items() if k in own and torch.is_tensor(v)}
        fitting = {k: v for k, v in common.items() if v.shape == own[k].shape}
    except Exception as error:  # a stranger's file: the unpickler raises what it likes
        raise NATSError(f"weights {path}: not a state dict: {one_line(error)}") from None
    share = len(fitting) / len(own)
    # the last layer, which is no conv, may be of other classes
    other = [k for k in common if k not in fitting and own[k].ndim == 4]
    if share < 0.5 or other:
        raise NATSError(
            f"weights {path}: hold {len(fitting)} of the network's {len(own)} tensors"
            + (f", and {other[0]} has another shape" if other else "")
            + ": are they of another network?"
        )
    network.load_state_dict(fitting, strict=False)
    return share
