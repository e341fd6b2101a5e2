"""One step of a training: forward and backward pass of an objective, in agreement of all ranks."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Optional, Tuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from .determinism import random_states, set_random_states
from .processes import stop_requested


def _nothing() -> None:
    pass


@dataclass
class Objective:
    """What one kind of step does: which losses, of which data, change which parameters.

    Attributes:
        name: "weight" or "alpha", also in checkpoints.
        losses: callable, batch → dict of losses.
        loader: endless iterable of batches.
        optimizer: of the parameters that the step changes.
        cfg: says where they are, and in which precision they are trained (``SOLVER.AMP``).
        scope: makes a context manager in which a step is taken and logged.
        average_gradients: called after each backward pass, to average the gradients over the ranks;
            by default `losses` is wrapped for data parallelism, which has done it by then.
    """

    name: str
    losses: Callable[[List[dict]], Dict[str, torch.Tensor]]
    loader: Any
    optimizer: torch.optim.Optimizer
    cfg: CfgNode
    scope: Callable[[], ContextManager] = nullcontext
    average_gradients: Callable[[], None] = _nothing
    _iterator: Optional[Iterator] = None

    def __post_init__(self):
        self.device, self.amp = torch.device(self.cfg.MODEL.DEVICE), self.cfg.SOLVER.AMP
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

    def apply_gradients(self) -> bool:
        """Change the parameters; returns False, and changes nothing, if a gradient is not finite.

        float16's loss scale starts too high on purpose. The steps that :class:`GradScaler` skips to
        find it count as taken.
        """
        self.scaler.unscale_(self.optimizer)
        if self.scaler.get_scale() <= 1.0 and not finite_gradients(self.parameters):
            return False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)  # free the memory for the other objective
        return True

    def rehearse(self) -> None:
        """Compute the gradient of the next step, then restore everything that this changed.

        Call it on all ranks. The run then continues as if nothing had happened, bit for bit.
        """
        states, loader_state = random_states(self.device), self.loader.state_dict()
        try:
            batch = self.next_batch()
        finally:
            self.close()
        with EventStorage(-1), self.scope():  # what it logs belongs to no iteration
            self.compute_gradients(batch)
            self.optimizer.zero_grad(set_to_none=True)
        self.loader.load_state_dict(loader_state)
        set_random_states(states, self.device)

    @property
    def parameters(self) -> List[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def state_dict(self) -> Dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state_dict(),
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.loader.load_state_dict(state["loader"])
        self._iterator = None


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
    """Mean losses, equal on all ranks.

    Returns:
        Also whether any rank was asked to stop, which the same message tells.
    """
    values = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
    ranks = comm.all_gather((stop_requested(), values))
    means = [sum(column) / len(ranks) for column in zip(*(own for _, own in ranks))]
    return dict(zip(losses, means)), any(stop for stop, _ in ranks)


def finite_gradients(parameters: List[nn.Parameter]) -> bool:
    """Whether all gradients are finite, with one transfer from the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    return bool(torch.stack([norm.float() for norm in norms]).sum().isfinite())
