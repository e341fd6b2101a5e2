"""What a forward pass changes besides its outputs."""

from typing import Optional

import torch
from torch import nn


class ForwardState:
    """What a forward pass in training changes, to be put back after a step that must not count.

    Batch norms' running statistics, and a dense detector's `loss_normalizer`: a running mean of how
    many anchors are positive, which Detectron2 keeps as a plain number in no state dict.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.buffers = [b for m in norms for b in m.buffers(recurse=False)]
        self.copies = [torch.empty_like(b) for b in self.buffers]
        self.save()

    @property
    def normalizer(self) -> Optional[float]:
        """Of this rank; None before the first step, and where the detector has none."""
        return getattr(self.model, "loss_normalizer", None)

    @normalizer.setter
    def normalizer(self, value: Optional[float]) -> None:
        if value is not None:
            self.model.loss_normalizer = value
        elif self.normalizer is not None:
            del self.model.loss_normalizer

    def save(self) -> None:
        self._normalizer = self.normalizer
        if self.buffers:
            torch._foreach_copy_(self.copies, self.buffers)

    def restore(self) -> None:
        self.normalizer = self._normalizer
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.copies)
