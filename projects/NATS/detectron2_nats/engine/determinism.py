"""What a run's bits depend on besides the config: random states, threads, the kind of CPU."""

import contextlib
import logging
import os
import random
from typing import Any, Dict, Iterator, List, Optional, Sequence

import numpy as np
import torch

from detectron2.utils import comm

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def preserved_random_states(seed: Optional[Sequence[int]] = None) -> Iterator[None]:
    """Restore the CPU's global random states after the block; in it they start from `seed`."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        if seed is not None:
            a, b, c = (int(word) for word in np.random.SeedSequence(seed).generate_state(3))
            random.seed(a)
            np.random.seed(b)
            torch.default_generator.manual_seed(c)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def random_states(device: torch.device) -> Dict[str, Any]:
    """This process's random states, including that of `device`, as tensors and plain types."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def set_random_states(state: Dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def computed_by(device: str) -> List[Any]:
    """[kind of processor, number of threads]: the last bit of a sum depends on both."""
    if device.startswith("cuda"):
        return [torch.cuda.get_device_name(device), torch.get_num_threads()]
    return [f"CPU with {torch.backends.cpu.get_cpu_capability()}", torch.get_num_threads()]


def compute_as(before: List[Any], device: str) -> None:
    """Use as many threads as before, unless OMP_NUM_THREADS is set; warn if anything differs."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(before[1])
    now = computed_by(device)
    if now != before:
        logger.warning(
            f"rank {comm.get_rank()}: the checkpoint was computed by {before[0]}, {before[1]} "
            f"threads, and now it is {now[0]}, {now[1]} threads: the run continues, but not bit "
            "for bit"
        )
