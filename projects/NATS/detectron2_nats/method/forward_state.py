"""What a forward pass changes besides its outputs."""

import torch
from torch import nn


class ForwardState:
    """What a forward pass in training changes, to be put back after a step that must not count.

    All buffers, such as norms' running statistics, and a dense detector's `loss_normalizer`: a
    running mean of how many anchors are positive, which Detectron2 keeps in no state dict.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.places = [(m, name) for m in model.modules() for name, _ in m.named_buffers("", False)]
        self.buffers = [module._buffers[name] for module, name in self.places]
        self.copies = [buffer.clone() for buffer in self.buffers]
        self.normalizer = getattr(model, "loss_normalizer", None)

    @torch.no_grad()
    def restore(self) -> None:
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.copies)
        for (module, name), buffer in zip(self.places, self.buffers):
            module._buffers[name] = buffer  # a pass may have put another one there
        if self.normalizer is not None:
            self.model.loss_normalizer = self.normalizer
        elif hasattr(self.model, "loss_normalizer"):  # this pass was the first
            del self.model.loss_normalizer
