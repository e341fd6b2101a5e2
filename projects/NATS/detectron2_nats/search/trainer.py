"""The search: SGD trains the weights on one split, Adam trains α on another (section 4.2)."""

import logging
import os
import time
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from ..config.comparing import config_differences
from ..config.keys import genotype_set
from ..data.overlap import check_disjoint, warn_of_test_images
from ..engine.hooks import AverageHook
from ..engine.loader import ResumableLoader, build_resumable_loader, dataset_dicts
from ..engine.resumable import ResumableTrainer
from ..engine.steps import Objective
from ..errors import NATSError
from ..method.alpha import alpha_parameters, alpha_training, untrained_convs
from ..method.architecture import Architecture
from ..method.decidedness import Decidedness
from ..method.names import searched_layers
from ..method.transform import frozen_state_dict
from .alpha_log import AlphaHook
from .compare import StepTimes, comparison_commands
from .export import export_config, retrain_config, write_config, write_weights

logger = logging.getLogger(__name__)


class SearchTrainer(ResumableTrainer):
    """Trains a super-network and writes ``architecture.yaml`` and ``retrain.yaml`` to OUTPUT_DIR.

    Each iteration takes a weight step on ``DATASETS.TRAIN``. After ``SEARCH.ALPHA_START`` of the
    search, an α step on ``DATASETS.CALIBRATION`` follows. α's gradient is first order: the weights
    count as constants (the paper does not say).

    With ``SEARCH.FREEZE_AT`` or ``FREEZE_WHEN_DECIDED`` the choice is frozen in the middle of the
    run (:meth:`freeze`), which then goes on training.

    Attributes:
        search_end: the iteration at which the choice is frozen at the latest; max_iter for a search
            alone.
        frozen_at: the number of iterations done when it was; None before.

    Args:
        cfg: has the keys of :func:`add_nats_config`, and an empty ``MODEL.NATS.ARCHITECTURE``.

    Raises:
        NATSError: bad input; raised before training starts.
    """

    DATA = ("TRAIN", "CALIBRATION", "TEST")

    def __init__(self, cfg: CfgNode):
        freezes = cfg.SEARCH.FREEZE_AT < 1 or cfg.SEARCH.FREEZE_WHEN_DECIDED
        if freezes and not (cfg.MODEL.NATS.SAMPLE and cfg.SEARCH.RETRAIN_WEIGHTS == "supernet"):
            raise NATSError(
                "SEARCH.FREEZE_AT and FREEZE_WHEN_DECIDED go on with the super-network's weights: "
                "set MODEL.NATS.SAMPLE True and SEARCH.RETRAIN_WEIGHTS supernet"
            )
        if freezes and cfg.MODEL.LOAD_PROPOSALS:
            raise NATSError(
                "SEARCH.FREEZE_AT goes on with both splits, which precomputed proposals "
                "cannot follow: set MODEL.LOAD_PROPOSALS False"
            )
        # Fail on a wrong path now, not days later
        self.retrain_base = retrain_config(cfg)
        super().__init__(cfg)
        cfg = self.cfg  # scaled to the number of processes
        self.search_end = max(1, round(cfg.SEARCH.FREEZE_AT * self.max_iter))
        self.alpha_start = round(cfg.SEARCH.ALPHA_START * self.search_end)
        self.frozen_at: Optional[int] = None
        if self.alpha_start >= self.search_end:
            raise NATSError(
                f"no α step: the search ends after {self.search_end} of {self.max_iter} "
                f"iterations, and SEARCH.ALPHA_START {cfg.SEARCH.ALPHA_START} of it is "
                f"{self.alpha_start}. Lower it, or raise SEARCH.FREEZE_AT or SOLVER.MAX_ITER"
            )
        # The same for settings that cannot be decoded, and for a result that cannot fit
        export_config(self.retrain_base, self.architecture())
        self._step_times = StepTimes()
        loader = self._loader(
            cfg.DATASETS.CALIBRATION,
            cfg.SEARCH.ALPHA_IMS_PER_BATCH or cfg.SOLVER.IMS_PER_BATCH,
            self.seed + 1,
        )
        check_disjoint(self.weight_objective.loader.files, loader.files)
        warn_of_test_images(cfg.DATASETS.TEST, loader.files, "DATASETS.CALIBRATION")
        optimizer = torch.optim.Adam(
            alpha_parameters(self._supernet),
            lr=cfg.SEARCH.ALPHA_LR,
            weight_decay=cfg.SEARCH.ALPHA_WEIGHT_DECAY,
        )
        self.alpha_objective = self.new_objective(
            "alpha",
            self._alpha_losses,
            loader,
            optimizer,
            average_gradients=self._average_alpha_gradients,
            prefix="alpha/",
        )

    def prepare_model(self, model: nn.Module) -> None:
        self._supernet = model
        self.searched = searched_layers(model)
        if not self.searched:
            raise NATSError(
                "nothing to search: set MODEL.BACKBONE.NAME to build_nats_backbone and leave "
                "MODEL.NATS.ARCHITECTURE empty"
            )
        # Without requires_grad, the weights' optimizer and data parallelism both skip α.
        for alpha in alpha_parameters(model):
            alpha.requires_grad_(False)
        self._trained_weights = [p for p in model.parameters() if p.requires_grad]

    def objectives(self) -> Dict[str, Objective]:
        return {**super().objectives(), "alpha": self.alpha_objective}

    def run_step(self) -> None:
        times = [time.perf_counter()]
        self.weight_step()
        times.append(time.perf_counter())
        if self.iter >= self.alpha_start and self.frozen_at is None:
            self.alpha_step()
            times.append(time.perf_counter())
        self._step_times.add(*np.diff(times))

    def alpha_step(self) -> None:
        """Take an Adam step on α, on a batch of ``DATASETS.CALIBRATION``. Nothing else changes."""
        with alpha_training(self._supernet):
            self.take_step(self.alpha_objective)

    def freeze(self) -> None:
        """End the search in the middle of the run: from now on, train what α decodes to.

        Weights, their momentum and the schedule go on. The images of both splits train the weights.
        """
        for name, segments in self.architecture().layers.items():
            self.searched[name].settle(segments)
        self.frozen_at = self.iter + 1
        self._train_on_both_splits()
        self.alpha_objective.close()
        for hook in self._hooks:
            if isinstance(hook, AverageHook):
                hook.restart()
        decidedness = self.decidedness()
        logger.log(
            logging.INFO if decidedness.decided else logging.WARNING,
            f"the architecture is frozen after iteration {self.iter}: {decidedness.verdict()} "
            f"({decidedness}). What is left of {self.max_iter} iterations trains it on all "
            f"{len(self.weight_objective.loader.files)} images",
        )

    def _train_on_both_splits(self) -> None:
        self.weight_objective.close()
        names = (*self.cfg.DATASETS.TRAIN, *self.cfg.DATASETS.CALIBRATION)
        self.weight_objective.loader = self._loader(names, self.cfg.SOLVER.IMS_PER_BATCH, self.seed)

    def _loader(self, names: Sequence[str], images: int, seed: int) -> ResumableLoader:
        """Batches of so many images of the data sets `names`."""
        dicts = dataset_dicts(self.cfg, names)
        return build_resumable_loader(self.cfg, dicts, total_batch_size=images, seed=seed)

    def rehearse_alpha_step(self) -> None:
        """Compute the gradient of an α step and discard it.

        Too little memory or unreadable calibration data then stop the search at its start, not when
        the first α step comes.
        """
        momentum = []  # as much memory as SGD's momentum will take by then
        if not self.weight_objective.optimizer.state:
            momentum = [torch.empty_like(weight) for weight in self._trained_weights]
        with alpha_training(self._supernet):
            needed = self.alpha_objective.rehearse()
        del momentum
        logger.info(f"α steps start at iteration {self.alpha_start}. One α step takes {needed}")

    def _alpha_losses(self, batch: List[dict]) -> Dict[str, torch.Tensor]:
        # The scope separates what the heads log from what they log in the weight step.
        with get_event_storage().name_scope("alpha"):
            return self._loss_module(batch)

    def _average_alpha_gradients(self) -> None:
        """In one message over all ranks, because data parallelism does not include α."""
        idle = untrained_convs(self._supernet)
        if idle:
            raise NATSError(
                f"the loss does not depend on {', '.join(idle)}: use them in the heads, or leave "
                "them out of the search (MODEL.NATS.CONVS)"
            )
        if comm.get_world_size() == 1:
            return
        gradients = [conv.alpha.grad for conv in self.searched.values()]
        flat = torch.cat([g.flatten() for g in gradients])
        torch.distributed.all_reduce(flat)
        flat /= comm.get_world_size()
        for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(piece.view_as(gradient))

    # -- results --------------------------------------------------------------------------------

    def architecture(self) -> Architecture:
        """The architecture that the current α decodes to."""
        search = self.cfg.SEARCH
        groups = {name: conv.num_groups for name, conv in self.searched.items()}
        # the super-network's weights fit only voted order
        order = "voted" if search.RETRAIN_WEIGHTS == "supernet" else search.DECODE_ORDER
        return Architecture.decode(
            self._supernet,
            order,
            search.DECODE_MARGIN,
            search.DECODE_AT_MOST,
            space=genotype_set(self.cfg),
            num_groups=groups if len(set(groups.values())) > 1 else max(groups.values()),
            iteration=self.frozen_at or min(self.iter + 1, self.max_iter),
            max_iter=self.max_iter,
            seed=self.seed,
            decidedness=self.decidedness().summary(),
        )

    def alphas(self) -> Dict[str, np.ndarray]:
        """Layer → α, (N, G)."""
        return {name: conv.alpha.detach().cpu().numpy() for name, conv in self.searched.items()}

    def decidedness(self) -> Decidedness:
        """How decided the current α is."""
        return Decidedness.of(self.alphas(), self._alpha_hook.tenth_votes)

    def after_checkpoint(self) -> None:
        if not comm.is_main_process():
            return
        architecture = self.architecture()
        for name in (f"architecture_{self.iter:07d}.yaml", "architecture.yaml"):
            architecture.save(os.path.join(self.cfg.OUTPUT_DIR, name))

    def train(self):
        """Train to the end and write the result; a finished search writes it again."""
        if self.start_iter < self.alpha_start:
            self.rehearse_alpha_step()
        results = super().train()
        if comm.is_main_process():
            decidedness = self.decidedness()
            logger.log(
                logging.INFO if decidedness.decided else logging.WARNING,
                f"The search is {decidedness.verdict()} ({decidedness})",
            )
            names = ("architecture.yaml", "retrain.yaml")
            path, retrain = (os.path.join(self.cfg.OUTPUT_DIR, name) for name in names)
            logger.info(f"Search done: wrote {path} and the plain config {retrain}")
            trained = self.frozen_at is not None
            if trained:
                weights = os.path.join(self.cfg.OUTPUT_DIR, "frozen.pth")
                logger.info(f"{retrain} starts from {weights}, which this run has trained already")
            alpha_steps = (self.frozen_at or self.max_iter) - self.alpha_start
            steps = self._step_times.in_weight_steps(self.max_iter, alpha_steps)
            architecture = self.architecture()
            cfg = self._retrain_config(architecture)
            logger.info(comparison_commands(self.cfg, cfg, architecture, steps, trained))
        return results

    def write_result(self) -> None:
        """Write architecture, plain config and, if asked for, weights to OUTPUT_DIR."""
        architecture = self.architecture()
        architecture.save(os.path.join(self.cfg.OUTPUT_DIR, "architecture.yaml"))
        cfg = self._retrain_config(architecture)
        if self.cfg.SEARCH.RETRAIN_WEIGHTS == "supernet":
            frozen = frozen_state_dict(self.model, architecture)
            write_weights(frozen, architecture, cfg.MODEL.WEIGHTS)
        write_config(cfg, os.path.join(self.cfg.OUTPUT_DIR, "retrain.yaml"))

    def _retrain_config(self, architecture: Architecture) -> CfgNode:
        cfg = export_config(self.retrain_base, architecture)
        if self.cfg.SEARCH.RETRAIN_WEIGHTS == "supernet":
            cfg.MODEL.WEIGHTS = os.path.join(self.cfg.OUTPUT_DIR, "frozen.pth")
        return cfg

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        if self.frozen_at is None and any(
            getattr(conv, "settled", None) for conv in self.searched.values()
        ):
            raise NATSError(
                f"MODEL.WEIGHTS {self.cfg.MODEL.WEIGHTS} is of a run that froze its choice, and "
                "nothing is left to search: start from the frozen.pth beside it"
            )

    def check_same_run(self, saved: Dict[str, Any]) -> None:
        differences = config_differences(saved["config"], self.given_cfg)
        if differences:
            raise NATSError(
                f"{self.cfg.OUTPUT_DIR} contains a search with other settings: "
                f"{'; '.join(differences[:5])}. Choose another OUTPUT_DIR or restore the settings"
            )
        if saved["run"].get("frozen_at") is not None:
            self._train_on_both_splits()

    def build_hooks(self) -> List[HookBase]:
        built = super().build_hooks()
        self._alpha_hook = AlphaHook(self.cfg.RUN.LOG_PERIOD, self.cfg.RUN.RANK_CHECK_PERIOD)
        # early in the list: what it logs must be there when the writer writes, and the result is
        # written before the last evaluation, which may fail
        return [built[0], self._alpha_hook, _ResultHook(), *built[1:]]

    def state_dict(self):
        hook = self._alpha_hook
        votes = {
            name: getattr(hook, name) for name in ("last_votes", "tenth_votes", "full_tenth_votes")
        }
        return {**super().state_dict(), **votes, "frozen_at": self.frozen_at}

    def load_state_dict(self, state) -> None:
        super().load_state_dict(state)
        self._alpha_hook.last_votes = state["last_votes"]
        self._alpha_hook.tenth_votes = state["tenth_votes"]
        # older versions froze nothing
        self._alpha_hook.full_tenth_votes = state.get("full_tenth_votes", {})
        self.frozen_at = state.get("frozen_at")

    def _rescale_steps(self, factor: float) -> None:
        super()._rescale_steps(factor)
        if self.frozen_at is not None:
            self.frozen_at = round(self.frozen_at * factor)


class _ResultHook(HookBase):
    """Writes the result of a search that has come to its end."""

    def after_train(self):
        if self.trainer.iter >= self.trainer.max_iter and comm.is_main_process():
            self.trainer.write_result()
