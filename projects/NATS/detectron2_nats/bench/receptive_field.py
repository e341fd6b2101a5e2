"""How far a network sees: the effective receptive field of its stages (the paper's Figure 4)."""

from typing import Dict

import numpy as np
import torch
from torch import nn

from ..method.stages import residual_stages


def effective_receptive_fields(module: nn.Module, images: torch.Tensor) -> Dict[str, np.ndarray]:
    """What the centre of each stage's output sees of the input.

    This is the gradient of the output at the centre, summed over its channels, with respect to the
    input. Its absolute value is summed over the colours, normalised, and averaged over the images,
    so that all images count equally. Norms use their stored statistics: batch statistics would let
    every position see all others.

    Args:
        module: contains residual stages. Its training mode is restored.
        images: (B, 3, H, W), normalised as the backbone expects.

    Returns:
        Stage → field, (H, W), which adds up to 1.
    """
    outputs: Dict[str, torch.Tensor] = {}
    stages = residual_stages(module)
    hooks = [
        stage.register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y}))
        for name, stage in stages.items()
    ]
    was_training = module.training
    sums = {name: torch.zeros(images.shape[-2:]) for name in stages}
    try:
        module.eval()
        for image in images:
            x = image[None].clone().requires_grad_(True)
            with torch.enable_grad():
                module(x)
                for name, y in outputs.items():
                    centre = y[..., y.shape[-2] // 2, y.shape[-1] // 2].sum()
                    (gradient,) = torch.autograd.grad(centre, x, retain_graph=True)
                    field = gradient[0].abs().sum(0).cpu()
                    sums[name] += field / field.sum().clamp(min=1e-30)
            outputs.clear()
    finally:
        module.train(was_training)
        for hook in hooks:
            hook.remove()
    return {name: (field / len(images)).numpy() for name, field in sums.items()}


def mass_side(field: np.ndarray, share: float = 0.9) -> int:
    """Side in pixels of the smallest central square that contains `share` of a field, (H, W)."""
    height, width = field.shape
    rows, columns = np.abs(np.arange(height) - height // 2), np.abs(np.arange(width) - width // 2)
    distance = np.maximum(rows[:, None], columns[None, :])
    mass = np.cumsum(np.bincount(distance.ravel(), weights=field.ravel()))
    return 2 * int(np.searchsorted(mass, share * mass[-1])) + 1
