"""A search's output folder: the one place that knows what lies in it."""

import os
from functools import cached_property
from typing import TYPE_CHECKING, Any, Dict, Tuple

import torch
from torch import nn

from ..errors import NATSError, one_line
from ..method.architecture import Architecture

if TYPE_CHECKING:
    from detectron2.config import CfgNode

# Detectron2 is imported where it is needed: pictures of what was found do without.


class SearchFolder:
    """The OUTPUT_DIR of a search.

    Of the checkpoints, the newest intact one is read, everywhere; a warning names those that are
    damaged.

    Args:
        path: of the folder, or of an architecture file in it.
    """

    def __init__(self, path: str):
        self.path = path if os.path.isdir(path) else os.path.dirname(path)
        self.architecture_file = self.file("architecture.yaml") if os.path.isdir(path) else path

    def file(self, name: str) -> str:
        """The path of a file in it, whether there is one or not."""
        return os.path.join(self.path, name)

    def has(self, name: str) -> bool:
        """Whether there is such a file, with something in it."""
        return os.path.isfile(self.file(name)) and os.path.getsize(self.file(name)) > 0

    def architecture(self) -> Architecture:
        """What the search wrote, or the architecture file that was named instead of the folder."""
        return Architecture.load(self.architecture_file)

    @property
    def cfg(self) -> "CfgNode":
        """The search's config.

        Raises:
            NATSError: it has none.
        """
        from ..config import load_config

        if not self.has("config.yaml"):
            raise NATSError(
                f"{self.path or '.'} is not a search's output folder: it has no config.yaml"
            )
        return load_config(self.file("config.yaml"))

    @cached_property
    def checkpoint(self) -> str:
        """The path of the newest intact checkpoint.

        Raises:
            NATSError: there is none, or all are damaged.
        """
        from ..engine.checkpoint import SafeCheckpointer

        found = SafeCheckpointer(nn.Module(), self.path).find_usable_checkpoint()
        if not found:
            raise NATSError(f"{self.path or '.'} contains no checkpoint: search first")
        return found

    @cached_property
    def supernet(self) -> Tuple[Dict[str, torch.Tensor], nn.Module]:
        """The searched detector's state dict, and its backbone, on the CPU.

        Raises:
            NATSError: the checkpoint is not one of the search that the config describes.
        """
        from detectron2.modeling import build_backbone

        with torch.device("meta"):  # the weights will be in memory
            backbone = build_backbone(self.cfg)
        try:
            content = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            state_dict: Dict[str, torch.Tensor] = content["model"]
            weights = {k[9:]: v for k, v in state_dict.items() if k.startswith("backbone.")}
            backbone.load_state_dict(weights, assign=True)
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise NATSError(
                f"{self.checkpoint} does not fit {self.file('config.yaml')}: {one_line(error)}"
            ) from None
        return state_dict, backbone

    def decode(
        self, order: str, margin: float = 0.0, at_most: int = 0, **search: Any
    ) -> Architecture:
        """Decode the checkpoint's α; see :meth:`Architecture.decode`."""
        return Architecture.decode(self.supernet[1], order, margin, at_most, **search)

    def detector(self) -> nn.Module:
        """The searched detector, with the checkpoint's weights, on a device that there is here."""
        from detectron2.modeling import build_model

        from ..engine.checkpoint import SafeCheckpointer
        from ..engine.machine import set_usable_device

        cfg = self.cfg
        set_usable_device(cfg)
        model = build_model(cfg)
        SafeCheckpointer(model, "").load(self.checkpoint, checkpointables=[])
        return model
