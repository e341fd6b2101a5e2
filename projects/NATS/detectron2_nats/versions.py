"""The least PyTorch that works, checked when the package is imported."""

import torch

LEAST_TORCH = (2, 4)
"""2.3 takes no device in ``torch.is_autocast_enabled``."""

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < LEAST_TORCH:
    raise ImportError(
        f"detectron2_nats needs PyTorch {'.'.join(map(str, LEAST_TORCH))} or newer, this is "
        f"{torch.__version__}: update torch and torchvision"
    )
