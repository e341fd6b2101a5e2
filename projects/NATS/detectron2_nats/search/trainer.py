"""The search: SGD trains the weights on one split, Adam trains α on another (section 4.2)."""

import contextlib
import logging
import os
from typing import Dict, Iterator, List

import numpy as np
import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from ..config.keys import genotype_set
from ..data.overlap import check_disjoint, warn_of_test_images
from ..engine.phases import Phase, Phases
from ..engine.resumable import ResumableTrainer
from ..engine.steps import Objective
from ..errors import NATSError
from ..method.alpha import alpha_parameters, alpha_training, untrained_convs
from ..method.architecture import Architecture
from ..method.decidedness import Decidedness
from ..method.names import searched_layers
from ..method.transform import frozen_state_dict
from .compare import comparison_commands
from .export import export_config, retrain_config, write_config, write_weights
from .hooks import AlphaHook, ResultHook, ScoreHook, check_ranks_agree

logger = logging.getLogger(__name__)


class SearchTrainer(ResumableTrainer):
    """Trains a super-network and writes ``architecture.yaml`` and ``retrain.yaml`` to OUTPUT_DIR.

    Each iteration takes a weight step on ``DATASETS.TRAIN``. After ``SEARCH.ALPHA_START`` of the
    search, an α step on ``DATASETS.CALIBRATION`` follows. α's gradient is first order: the weights
    count as constants (the paper does not say).

    With ``SEARCH.FREEZE_AT`` or ``FREEZE_WHEN_DECIDED`` a second phase follows in the same run: the
    choice is frozen, and trained on the images of both splits.

    Attributes:
        searched: name → searched conv.
        alpha_start: the first iteration with an α step.
        search_end: the number of iterations done when the search ends at the latest.

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
        if cfg.MODEL.LOAD_PROPOSALS:
            raise NATSError(
                "precomputed proposals of DATASETS.CALIBRATION cannot be named: set "
                "MODEL.LOAD_PROPOSALS False"
            )
        # Fail on a wrong path now, not days later
        self.retrain_base = retrain_config(cfg)
        super().__init__(cfg)
        cfg = self.cfg  # scaled to the number of processes
        self.search_end = max(1, round(cfg.SEARCH.FREEZE_AT * self.max_iter))
        self.alpha_start = round(cfg.SEARCH.ALPHA_START * self.search_end)
        if self.alpha_start >= self.search_end:
            raise NATSError(
                f"no α step: the search ends after {self.search_end} of {self.max_iter} "
                f"iterations, and SEARCH.ALPHA_START {cfg.SEARCH.ALPHA_START} of it is "
                f"{self.alpha_start}. Lower it, or raise SEARCH.FREEZE_AT or SOLVER.MAX_ITER"
            )
        self._search = Phase(
            {"weight": 0, "alpha": self.alpha_start},
            end=self.search_end,
            is_over=self._is_decided,
            finish=self._score_hook.report,
        )
        train = Phase({"weight": 0}, end=self.max_iter, begin=self._freeze)
        self.phases = Phases(self._search, *([train] if freezes else []))
        # The same for settings that cannot be decoded, and for a result that cannot fit
        export_config(self.retrain_base, self.architecture())
        images = cfg.SEARCH.ALPHA_IMS_PER_BATCH or cfg.SOLVER.IMS_PER_BATCH
        loader = self.build_loader(cfg.DATASETS.CALIBRATION, images, self.seed + 1)
        check_disjoint(self.objectives["weight"].loader.files, loader.files)
        warn_of_test_images(cfg.DATASETS.TEST, loader.files, "DATASETS.CALIBRATION")
        self.objectives["alpha"] = Objective(
            "alpha",
            self.model,
            loader,
            torch.optim.Adam(
                alpha_parameters(self.model),
                lr=cfg.SEARCH.ALPHA_LR,
                weight_decay=cfg.SEARCH.ALPHA_WEIGHT_DECAY,
            ),
            cfg,
            scope=self._alpha_scope,
            average_gradients=self._average_alpha_gradients,
        )

    def prepare_model(self, model: nn.Module) -> None:
        self.searched = searched_layers(model)
        if not self.searched:
            raise NATSError(
                "nothing to search: set MODEL.BACKBONE.NAME to build_nats_backbone and leave "
                "MODEL.NATS.ARCHITECTURE empty"
            )
        # Without requires_grad, the weights' optimizer and data parallelism both skip α.
        for alpha in alpha_parameters(model):
            alpha.requires_grad_(False)

    # -- phases -----------------------------------------------------------------------------------

    @property
    def is_searching(self) -> bool:
        """Whether the run is in the phase that trains α."""
        return self.phases.current is self._search

    def ends_a_tenth(self, done: int) -> bool:
        """Whether a tenth of the search, or several, end with the iteration `done`, from 1."""
        return done * 10 // self.search_end > (done - 1) * 10 // self.search_end

    def _is_decided(self) -> bool:
        """Whether the choice is to be frozen early; looked at when a tenth has ended."""
        if not self.cfg.SEARCH.FREEZE_WHEN_DECIDED or not self._alpha_hook.votes_before():
            return False
        return self.ends_a_tenth(self.iter) and self.decidedness().decided

    def _freeze(self) -> None:
        """From now on, train what α decodes to, with the images of both splits.

        Weights, their momentum and the schedule go on.
        """
        check_ranks_agree(self.searched)
        for name, segments in self.architecture().layers.items():
            self.searched[name].settle(segments)
        for objective in self.objectives.values():
            objective.close()
        names = (*self.cfg.DATASETS.TRAIN, *self.cfg.DATASETS.CALIBRATION)
        loader = self.build_loader(names, self.cfg.SOLVER.IMS_PER_BATCH, self.seed)
        self.objectives["weight"].loader = loader
        decidedness = self.decidedness()
        logger.log(
            logging.INFO if decidedness.decided else logging.WARNING,
            f"the architecture is frozen after iteration {self.phases.start - 1}: "
            f"{decidedness.verdict()} ({decidedness}). What is left of {self.max_iter} iterations "
            f"trains it on all {len(loader.files)} images",
        )

    # -- α steps ----------------------------------------------------------------------------------

    def rehearse_alpha_step(self) -> None:
        """Compute the gradient of an α step and discard it.

        Too little memory or unreadable calibration data then stop the search at its start, not when
        the first α step comes.
        """
        momentum = []  # as much memory as SGD's momentum will take by then
        weight = self.objectives["weight"]
        if not weight.optimizer.state:
            momentum = [torch.empty_like(parameter) for parameter in weight.parameters]
        self.objectives["alpha"].rehearse()
        del momentum

    @contextlib.contextmanager
    def _alpha_scope(self) -> Iterator[None]:
        """Nothing but α changes, and what is logged is told from what a weight step logs."""
        with get_event_storage().name_scope("alpha"), alpha_training(self.model):
            yield

    def _average_alpha_gradients(self) -> None:
        """In one message over all ranks, because data parallelism does not include α."""
        idle = untrained_convs(self.model)
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
            self.model,
            order,
            search.DECODE_MARGIN,
            search.DECODE_AT_MOST,
            space=genotype_set(self.cfg),
            num_groups=groups if len(set(groups.values())) > 1 else max(groups.values()),
            iteration=min(self.iter + 1, self._search.end),
            max_iter=self.max_iter,
            seed=self.seed,
            decidedness=self.decidedness().summary(),
        )

    def alphas(self) -> Dict[str, np.ndarray]:
        """Layer → α, (N, G)."""
        return {name: conv.alpha.detach().cpu().numpy() for name, conv in self.searched.items()}

    def decidedness(self) -> Decidedness:
        """How decided the current α is."""
        return Decidedness.of(self.alphas(), self._alpha_hook.votes_before())

    def save_checkpoint(self, name: str) -> None:
        super().save_checkpoint(name)
        if comm.is_main_process():
            architecture = self.architecture()
            for name in (f"architecture_{self.iter:07d}.yaml", "architecture.yaml"):
                architecture.save(os.path.join(self.cfg.OUTPUT_DIR, name))

    def train(self):
        """Train to the end and write the result; a finished search writes it again."""
        if self.start_iter < self.alpha_start:
            self.rehearse_alpha_step()
        results = super().train()
        if comm.is_main_process():
            self._report()
        return results

    def _report(self) -> None:
        """Log how decided the search is, what was written, and what to compare it with."""
        decidedness, trained = self.decidedness(), not self.is_searching
        logger.log(
            logging.INFO if decidedness.decided else logging.WARNING,
            f"The search is {decidedness.verdict()} ({decidedness})",
        )
        names = ("architecture.yaml", "retrain.yaml", "frozen.pth")
        path, retrain, weights = (os.path.join(self.cfg.OUTPUT_DIR, name) for name in names)
        logger.info(f"Search done: wrote {path} and the plain config {retrain}")
        if trained:
            logger.info(f"{retrain} starts from {weights}, which this run has trained already")
        architecture = self.architecture()
        cfg = self._retrain_config(architecture)
        alpha_steps = self._search.end - self.alpha_start
        logger.info(comparison_commands(self.cfg, cfg, architecture, alpha_steps, trained))

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
        settled = any(getattr(conv, "settled", None) for conv in self.searched.values())
        if settled and self.is_searching:
            raise NATSError(
                f"MODEL.WEIGHTS {self.cfg.MODEL.WEIGHTS} is of a run that froze its choice, and "
                "nothing is left to search: start from the frozen.pth beside it"
            )

    def build_hooks(self) -> List[HookBase]:
        built = super().build_hooks()
        self._alpha_hook = AlphaHook(self.cfg.RUN.LOG_PERIOD, self.cfg.RUN.RANK_CHECK_PERIOD)
        self._score_hook = ScoreHook()
        # early in the list: what it logs must be there when the writer writes, and the result is
        # written before the last evaluation, which may fail
        return [built[0], self._alpha_hook, ResultHook(), *built[1:], self._score_hook]
