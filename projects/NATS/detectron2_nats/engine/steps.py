"""One step of a training: forward and backward pass of an objective, in agreement of all ranks."""

import logging
import math
import resource
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from .determinism import random_states, set_random_states
from .processes import stop_requested

logger = logging.getLogger(__name__)


def _nothing() -> None:
    pass


@dataclass
class Objective:
    """What one kind of step does: which losses, of which data, change which parameters.

    Attributes:
        name: "weight" or "alpha".
        losses: callable, batch → dict of losses.
        loader: endless iterable of batches.
        optimizer: of the parameters that the step changes.
        device: where they are.
        amp: ``SOLVER.AMP``.
        average_gradients: called after each backward pass, to average the gradients over the ranks;
            by default `losses` is wrapped for data parallelism, which has done it by then.
        prefix: of the names of all that the step logs.
        bad_in_row: steps skipped since the last one taken, for a loss or gradient that is not
            finite.
        bad_total: steps skipped in the whole run.
    """

    name: str
    losses: Callable[[List[dict]], Dict[str, torch.Tensor]]
    loader: Any
    optimizer: torch.optim.Optimizer
    device: torch.device
    amp: CfgNode
    average_gradients: Callable[[], None] = _nothing
    prefix: str = ""
    bad_in_row: int = 0
    bad_total: int = 0
    _iterator: Optional[Iterator] = None

    def __post_init__(self):
        loss_scaling = self.amp.ENABLED and self.amp.PRECISION == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=loss_scaling)

    def next_batch(self) -> List[dict]:
        if self._iterator is None:
            self._iterator = iter(self.loader)
        return next(self._iterator)

    def close(self) -> None:
        """End the loader's processes. The next batch starts new ones."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def compute_gradients(self, batch: List[dict]) -> Dict[str, torch.Tensor]:
        """Forward and backward pass, gradients averaged over ranks; returns this rank's losses."""
        precision = getattr(torch, self.amp.PRECISION)
        with torch.autocast(self.device.type, precision, enabled=self.amp.ENABLED):
            losses = self.losses(batch)
            total = sum(losses.values())
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        self.average_gradients()
        return losses

    def rehearse(self) -> str:
        """Compute the gradient of the next step, then restore everything that this changed.

        Call it on all ranks, in :func:`.alpha.alpha_training`. The run then continues as if nothing
        had happened, bit for bit.

        Returns:
            Time and peak memory, as text.
        """
        states, loader_state = random_states(self.device), self.loader.state_dict()
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            batch = self.next_batch()
        finally:
            self.close()
        start = time.perf_counter()
        with EventStorage(-1):  # what it logs belongs to no iteration
            self.compute_gradients(batch)
        if on_gpu:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        self.optimizer.zero_grad(set_to_none=True)
        self.loader.load_state_dict(loader_state)
        set_random_states(states, self.device)
        if on_gpu:
            peak = f"{torch.cuda.max_memory_allocated(self.device) / 2**20:.0f} MiB of the GPU"
        else:
            peak = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB"
        return f"{seconds:.2f} s, peak memory {peak}"

    @property
    def settings(self) -> List[Dict[str, Any]]:
        """Rate, weight decay and so on of each group of parameters."""
        groups = self.optimizer.param_groups
        return [{k: v for k, v in group.items() if k != "params"} for group in groups]

    @settings.setter
    def settings(self, values: List[Dict[str, Any]]) -> None:
        for group, own in zip(self.optimizer.param_groups, values):
            group.update(own)

    @property
    def parameters(self) -> List[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def state_dict(self) -> Dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "bad_in_row": self.bad_in_row,
            "bad_total": self.bad_total,
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.loader.load_state_dict(state["loader"])
        self.bad_in_row, self.bad_total = state["bad_in_row"], state["bad_total"]
        self._iterator = None


class LossModule(nn.Module):
    """A detector's losses; one NaN loss if Detectron2 raises because predictions are not finite.

    If a rank raised inside the forward pass, the others would wait for it in the all-reduces of the
    backward pass: those of the weights' gradients, and those of SyncBN in the backbone. With a NaN
    loss every rank takes part in them, and all ranks skip the step together.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, data: List[dict]) -> Dict[str, torch.Tensor]:
        reached = [p for p in self.model.parameters() if p.requires_grad]

        def keep(module, inputs, features):
            if isinstance(features, dict):  # Detectron2's backbones return a dict, others may not
                reached.extend(features.values())

        # Detectron2 checks the predictions after the backbone's forward pass
        hook = getattr(self.model, "backbone", self.model).register_forward_hook(keep)
        try:
            return self.model(data)
        except FloatingPointError as error:
            logger.warning(f"rank {comm.get_rank()}, forward pass: {error}")
            return {"loss": sum(tensor.sum() for tensor in reached) * math.nan}
        finally:
            hook.remove()


def distributed(module: nn.Module) -> nn.Module:
    """`module`, averaging gradients over ranks."""
    if comm.get_world_size() == 1:
        return module
    device = next(module.parameters()).device
    ids = [device] if device.type == "cuda" else None
    # Views: else each gradient is kept twice, once in the bucket that the ranks exchange
    return DistributedDataParallel(
        module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def mean_over_ranks(losses: Dict[str, torch.Tensor]) -> Tuple[Dict[str, float], bool]:
    """Mean losses; NaN where a rank lacks a loss because its forward pass raised.

    Returns:
        Also whether any rank was asked to stop, which the same message tells.
    """
    values = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
    ranks = comm.all_gather((stop_requested(), dict(zip(losses, values))))
    names = dict.fromkeys(name for _, own in ranks for name in own)  # the same on all ranks
    means = {name: sum(own.get(name, math.nan) for _, own in ranks) / len(ranks) for name in names}
    return means, any(stop for stop, _ in ranks)


def finite_gradients(parameters: List[nn.Parameter]) -> bool:
    """Whether all gradients are finite, with one transfer from the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    return bool(torch.stack([norm.float() for norm in norms]).sum().isfinite())
