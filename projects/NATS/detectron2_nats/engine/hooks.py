"""What a training does between steps: write checkpoints, evaluate, average the last weights."""

import logging
from typing import Any, Dict

import torch
from torch import nn

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from .processes import STOPPED_EXIT_CODE

logger = logging.getLogger(__name__)


class CheckpointHook(HookBase):
    """Writes checkpoints periodically, before evaluations, at the end, and on a stop request."""

    def __init__(self, *periods: int):
        self._periods = [period for period in periods if period > 0]

    def after_step(self):
        trainer, done = self.trainer, self.trainer.iter + 1
        if done >= trainer.max_iter:
            trainer.save_checkpoint("model_final")
        elif trainer._stop_now or any(done % period == 0 for period in self._periods):
            trainer.save_checkpoint(f"model_{trainer.iter:07d}")
        if trainer._stop_now and done < trainer.max_iter:
            logger.info(f"stopped on request after iteration {trainer.iter}. Resume with --resume")
            comm.synchronize()  # rank 0 writes longer than the others
            raise SystemExit(STOPPED_EXIT_CODE)


class EvalHook(hooks.EvalHook):
    """Detectron2's; not after a last step that failed, where ranks would wait for each other."""

    def after_train(self):
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class AverageHook(HookBase):
    """At the end, replaces the weights by their mean over the last `share` of the iterations."""

    def __init__(self, share: float):
        self._share = share
        self._count, self._means = 0, {}

    def after_step(self):
        trainer, length = self.trainer, round(self._share * self.trainer.max_iter)
        if trainer.iter < trainer.max_iter - length:
            return
        averaged = self._averaged()
        if not self._count:
            self._means = {name: torch.zeros_like(value) for name, value in averaged.items()}
        self._count += 1
        for name, value in averaged.items():
            self._means[name].lerp_(value, 1 / self._count)
        if trainer.iter + 1 == trainer.max_iter:
            logger.info(f"the weights are now their mean over the last {self._count} iterations")
            for name, value in averaged.items():
                value.copy_(self._means[name])

    def restart(self) -> None:
        """Forget the iterations so far: another network is trained from now on."""
        self._count = 0

    def rescale(self, factor: float) -> None:
        """Count the mean so far as `factor` times as many iterations."""
        if self._count:
            self._count = max(1, round(self._count * factor))

    def _averaged(self) -> Dict[str, torch.Tensor]:
        """The trained weights, and the batch norm statistics that belong to them."""
        model = self.trainer.model
        averaged = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        for prefix, norm in model.named_modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
                averaged[f"{prefix}.running_mean"] = norm.running_mean
                averaged[f"{prefix}.running_var"] = norm.running_var
        return averaged

    def state_dict(self) -> Dict[str, Any]:
        return {"count": self._count, "means": self._means}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        device = next(self.trainer.model.parameters()).device
        self._count = state["count"]
        self._means = {name: value.to(device) for name, value in state["means"].items()}
