"""What a forward pass changes besides its outputs."""

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
        self.buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self.copies = [buffer.clone() for buffer in self.buffers]
        self.normalizer = getattr(model, "loss_normalizer", None)

    def restore(self) -> None:
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.copies)
        if self.normalizer is not None:
            self.model.loss_normalizer = self.normalizer
        elif hasattr(self.model, "loss_normalizer"):  # this pass was the first
            del self.model.loss_normalizer
