"""What a training does between steps: write checkpoints, evaluate, average the last weights."""

import logging
from typing import Any, Dict, List

import torch

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
    """At the end, replaces the weights by their mean over the last `share` of the iterations.

    Those of an earlier phase, which trained another network, do not count.
    """

    def __init__(self, share: float):
        self._share = share
        self._means: List[torch.Tensor] = []

    def after_step(self):
        trainer = self.trainer
        length = round(self._share * trainer.max_iter)
        first = max(trainer.max_iter - length, trainer.phases.start)
        if trainer.iter < first:
            return
        averaged, count = self._averaged(), trainer.iter - first + 1
        if count == 1:
            self._means = [tensor.clone() for tensor in averaged]
        for mean, tensor in zip(self._means, averaged):
            mean.lerp_(tensor, 1 / count)
        if trainer.iter + 1 == trainer.max_iter:
            logger.info(f"the weights are now their mean over the last {count} iterations")
            for mean, tensor in zip(self._means, averaged):
                tensor.copy_(mean)

    def _averaged(self) -> List[torch.Tensor]:
        """The trained weights, and the batch norm statistics that belong to them."""
        model = self.trainer.model
        tensors = [p.detach() for p in model.parameters() if p.requires_grad]
        return [*tensors, *(b for b in model.buffers() if b.is_floating_point())]

    def state_dict(self) -> Dict[str, Any]:
        return {"means": self._means}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        device = next(self.trainer.model.parameters()).device
        self._means = [mean.to(device) for mean in state["means"]]
