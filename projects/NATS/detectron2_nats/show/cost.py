"""What a network costs: parameters, FLOPs, activations, time."""

import time
from dataclasses import asdict, dataclass
from typing import Callable, List, Optional, Sequence

import torch
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from tabulate import tabulate
from torch import nn

from detectron2.export import TracingAdapter


@dataclass(frozen=True)
class Cost:
    """Counted cost of a backbone for one image.

    Attributes:
        parameters: number of values in all parameters.
        flops: multiply-adds, as fvcore counts them.
        activations: number of values in the outputs of convs and matrix products.
    """

    parameters: int
    flops: int
    activations: int


def backbone_cost(backbone: nn.Module, height: int, width: int) -> Cost:
    """Count the cost of a backbone for one image of `height` × `width` pixels."""
    device = next(backbone.parameters()).device
    image = torch.zeros(1, 3, height, width, device=device)
    was_training = backbone.training
    adapter = TracingAdapter(backbone.eval(), image, allow_non_tensor=True)
    counts = []
    with torch.no_grad():
        for count in (FlopCountAnalysis, ActivationCountAnalysis):
            counter = count(adapter, adapter.flattened_inputs)
            counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            counts.append(int(counter.total()))
    backbone.train(was_training)
    return Cost(sum(p.numel() for p in backbone.parameters()), *counts)


def cost_table(plain: Cost, searched: Cost) -> str:
    """A table of both costs, and by how much the searched backbone's differs ("equal" if not)."""
    rows = []
    for name, before in asdict(plain).items():
        after = getattr(searched, name)
        if after == before:
            difference = "equal"
        else:
            share = f" ({(after - before) / before:+.3%})" if before else ""
            difference = f"{after - before:+,}{share}"
        rows.append((name, f"{before:,}", f"{after:,}", difference))
    headers = ("", "plain", "searched", "difference")
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 3))


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
    timed = _seconds_on_cuda if device.startswith("cuda") else _seconds_on_cpu
    seconds: List[List[float]] = [[] for _ in functions]
    for index in range(-warm_up, rounds):
        for function, values in zip(functions, seconds):
            value = timed(function)
            if index >= 0:
                values.append(value)
    return seconds


def _seconds_on_cpu(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _seconds_on_cuda(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()  # what was started before must not count
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3
