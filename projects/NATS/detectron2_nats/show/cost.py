"""What a network costs: parameters, FLOPs, time."""

import time
from typing import Callable, Dict, List, Optional, Sequence

import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from detectron2.export import TracingAdapter


def backbone_cost(backbone: nn.Module, height: int, width: int) -> Dict[str, int]:
    """Count the cost of a backbone for one image of `height` × `width` pixels.

    Returns:
        "parameters": number of values in all parameters; "FLOPs": multiply-adds, as fvcore counts
        them.
    """
    image = torch.zeros(1, 3, height, width, device=next(backbone.parameters()).device)
    modes = {module: module.training for module in backbone.modules()}
    adapter = TracingAdapter(backbone.eval(), image, allow_non_tensor=True)
    counter = FlopCountAnalysis(adapter, adapter.flattened_inputs)
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad():
        flops = int(counter.total())
    for module, mode in modes.items():
        module.training = mode
    return {"parameters": sum(p.numel() for p in backbone.parameters()), "FLOPs": flops}


def interleaved_seconds(
    functions: Sequence[Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    device: Optional[str] = None,
) -> List[List[float]]:
    """Time each function once per round, in turn, so that a drift affects all of them equally.

    Args:
        warm_up: rounds before the first that counts.
        device: where the functions compute, "cpu" or "cuda"; by default CUDA if it is available.

    Returns:
        For each function a list of `rounds` values, in seconds.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    seconds: List[List[float]] = [[] for _ in functions]
    for index in range(-warm_up, rounds):
        for function, values in zip(functions, seconds):
            wait()  # what was started before must not count
            start = time.perf_counter()
            function()
            wait()
            if index >= 0:
                values.append(time.perf_counter() - start)
    return seconds
