"""What makes the two convs cheaper without changing what they compute; each with its measured gain.

The figures are those of docs/performance.md.
"""

from typing import Callable, List, Sequence

import torch
from torch.utils.checkpoint import checkpoint

_FEW_CHANNELS = 128  # as in res3 of ResNets, and in all stages of ResNeXts


def pads_first(padding: Sequence[int], depthwise: bool) -> bool:
    """Whether a CPU convolves faster when the input is padded in a step of its own.

    oneDNN's kernels of depthwise convs take no wider padding, and what it takes instead is 10 to 45
    times as slow (7×7, dilation 3); with this 1.7 to 3.3 times as the plain conv.
    """
    widest = 6 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 4
    return depthwise and padding[1] > widest


def fast_layouts(branches: int, depthwise: bool = False) -> List[bool]:
    """Whether a CPU convolves `branches` dilations faster in channels_last: [inference, training].

    oneDNN otherwise brings x into a layout of its own once per branch. With AVX-512 a conv of res3
    takes 1.18 × the plain one's time instead of 1.73 ×; with AVX2 the backbone's inference 1.02 ×
    instead of 1.41 ×, but training gains nothing: the convs that follow get that layout too.
    """
    processor = torch.backends.cpu.get_cpu_capability()
    several = branches > 1 and not depthwise  # whose time is the copies
    return [several and processor in ("AVX2", "AVX512"), several and processor == "AVX512"]


def to_fast_layout(x: torch.Tensor, fast: List[bool]) -> torch.Tensor:
    """`x` in the layout that :func:`fast_layouts` found; as it is on a GPU."""
    training = torch.is_grad_enabled() and not torch.jit.is_tracing()
    if fast[int(training)] and not x.is_cuda:
        x = x.contiguous(memory_format=torch.channels_last)
    return x


def recomputed(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, channels: int
) -> torch.Tensor:
    """``function(x)``, whose inner results are computed again in backward where that is cheap.

    Kept, the outputs of all genotypes of res3 take 141 MiB of 890 at 800 × 1216. Computing one
    number of them again takes 9 × `channels` products, so it is done where these are few.
    """
    if channels > _FEW_CHANNELS:
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
