"""A search's output folder: the one place that knows what lies in it."""

import os
from functools import cached_property
from typing import TYPE_CHECKING

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
    def detector(self) -> nn.Module:
        """The searched detector with the checkpoint's weights, on a device that there is here.

        Raises:
            NATSError: the checkpoint is not one of the search that the config describes.
        """
        from detectron2.modeling import build_model

        from ..engine.machine import set_usable_device

        cfg = self.cfg
        set_usable_device(cfg)
        model = build_model(cfg)
        try:
            content = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            model.load_state_dict(content["model"])
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise NATSError(
                f"{self.checkpoint} does not fit {self.file('config.yaml')}: {one_line(error)}"
            ) from None
        return model
