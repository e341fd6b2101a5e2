"""A `DefaultTrainer` whose runs can be stopped at any point and resumed bit for bit.

It adds to Detectron2's: checkpoints with each rank's random states and the loaders' positions,
phases, a stop at the first loss or gradient that is not finite, a clean stop on a signal, and
training on several CPU processes. The search and plain retraining share it.
"""

import logging
import math
import os
import time
import weakref
from typing import Any, Dict, List, NoReturn, Sequence

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm

from ..config.comparing import config_differences
from ..config.keys import check_config
from ..data.overlap import warn_of_test_images
from ..data.registry import check_data, register_datasets
from ..errors import NATSError, one_line
from .checkpoint import SafeCheckpointer
from .determinism import (
    compute_as,
    computed_by,
    preserved_random_states,
    random_states,
    set_random_states,
)
from .evaluation import build_evaluator, check_evaluator
from .hooks import AverageHook, CheckpointHook, EvalHook
from .loader import EvaluationLoader, ResumableLoader
from .machine import scaled_to_processes, with_cpu_sync_bn
from .own_loader import OwnLoader
from .phases import Phase, Phases
from .steps import Objective, distributed, mean_over_ranks
from .weights import warn_of_torchvision

logger = logging.getLogger(__name__)


class ResumableTrainer(DefaultTrainer):
    """Detectron2's trainer for one detector, exactly resumable.

    ``trainer.model`` is the detector itself on every rank. The data-parallel wrapper is internal.

    Attributes:
        objectives: all kinds of step, under their names.
        phases: of the run, with the objectives that each of them trains.

    Args:
        cfg: a config with the keys of :func:`add_nats_config`.

    Raises:
        NATSError: bad input; raised before training starts.
    """

    DATA = ("TRAIN", "TEST")  # keys of cfg.DATASETS that a run reads; all must have equal classes

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)
        self._check(cfg)
        self.given_cfg = cfg
        self.cfg = cfg = scaled_to_processes(cfg, comm.get_world_size())
        self._device = torch.device(cfg.MODEL.DEVICE)
        # One seed of order and augmentation for all ranks. Their random states differ.
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        with torch.random.fork_rng(devices=[]):
            # Equal weights on all ranks, whatever their random states are. The model is built on
            # the CPU and then moved. torch.manual_seed would also seed CUDA's generators, equally
            # on all ranks, and fork_rng would not restore them.
            torch.default_generator.manual_seed(self.seed)
            model = self.build_model(cfg)
        self.prepare_model(model)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_loader(cfg.DATASETS.TRAIN, cfg.SOLVER.IMS_PER_BATCH, self.seed)
        warn_of_test_images(cfg.DATASETS.TEST, loader.files, "DATASETS.TRAIN")
        # DefaultTrainer's properties read model, loader and optimizer from it; its steps are unused
        self._trainer = SimpleTrainer(model, loader, optimizer)
        weight = Objective("weight", distributed(model), loader, optimizer, cfg)
        self.objectives: Dict[str, Objective] = {"weight": weight}
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR, run=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.phases = Phases(Phase({"weight": 0}, self.max_iter))
        self._stop_now = False
        self.register_hooks(self.build_hooks())

    def _check(self, cfg: CfgNode) -> None:
        """Check the config and its data sets, now and not after days of training."""
        check_config(cfg)
        for key in self.DATA:
            if key != "TEST" and not cfg.DATASETS[key]:
                raise NATSError(f"DATASETS.{key} is empty: name the data set to train on")
        register_datasets(cfg)
        check_data(cfg, self.DATA)
        for name in cfg.DATASETS.TEST:
            check_evaluator(name)

    def prepare_model(self, model: nn.Module) -> None:
        """Called once, before the optimizer is built; for subclasses."""

    def build_loader(self, names: Sequence[str], images: int, seed: int) -> ResumableLoader:
        """Training batches of so many images of the data sets `names`."""
        build = type(self).build_train_loader
        if build.__func__ is not DefaultTrainer.build_train_loader.__func__:
            return OwnLoader(build, self.cfg, names, total_batch_size=images, seed=seed)
        return ResumableLoader(self.cfg, names, total_batch_size=images, seed=seed)

    # -- steps ------------------------------------------------------------------------------------

    def before_step(self) -> None:
        super().before_step()
        self.phases.before_iteration(self.iter)

    def run_step(self) -> None:
        for name in self.phases.current.objectives(self.iter):
            self.take_step(name)

    def take_step(self, name: str) -> None:
        """Take a step of an objective.

        Raises:
            NATSError: its loss or gradient is not finite on some rank. No weight was changed.
        """
        objective = self.objectives[name]
        start = time.perf_counter()
        batch = objective.next_batch()
        data_time = time.perf_counter() - start
        with objective.scope():
            try:
                losses = objective.compute_gradients(batch)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise NATSError(
                    "a batch norm is given one value: raise SOLVER.IMS_PER_BATCH or MIN_SIZE_TRAIN"
                ) from error
            except FloatingPointError as error:  # Detectron2's, on this rank alone: all will end
                self._end_not_finite(objective, str(error))
            self.after_backward()
            means, self._stop_now = mean_over_ranks(losses)
            total = sum(means.values())
            if not math.isfinite(total) or not objective.apply_gradients():
                self._end_not_finite(objective, f"losses {means}")
            self.storage.put_scalars(**means, total_loss=total, data_time=data_time)

    def _end_not_finite(self, objective: Objective, what: str) -> NoReturn:
        last = self.checkpointer.get_checkpoint_file() or "none yet"
        raise NATSError(
            f"iteration {self.iter}: the loss or gradient of the {objective.name} step is not "
            f"finite, {what}. Check the data and continue with --resume, or start a new run at a "
            "lower learning rate, in another OUTPUT_DIR with MODEL.WEIGHTS set to the last good "
            f"checkpoint, {last}"
        )

    # -- checkpoints ------------------------------------------------------------------------------

    def save_checkpoint(self, name: str) -> None:
        """Write a checkpoint. Call it on all ranks."""
        self._random_states = comm.gather(random_states(self._device))
        # RetinaNet's running mean of positive anchors, which Detectron2 keeps in no state dict
        self._normalizers = comm.gather(getattr(self.model, "loss_normalizer", None))
        self.checkpointer.save(
            name,
            iteration=self.iter,
            config=self.given_cfg.dump(),
            computed_by=comm.gather(computed_by(self.cfg.MODEL.DEVICE)),
            classes=MetadataCatalog.get(self.cfg.DATASETS.TRAIN[0]).get("thing_classes", []),
        )
        self.checkpointer.prune(self.cfg.RUN.KEEP_CHECKPOINTS)
        comm.synchronize()

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the newest intact checkpoint, or load ``MODEL.WEIGHTS`` and start.

        Raises:
            NATSError: OUTPUT_DIR contains another run's checkpoints, or only damaged ones.
        """
        if not resume and self.checkpointer.has_checkpoint():
            raise NATSError(
                f"{self.cfg.OUTPUT_DIR} contains checkpoints of an earlier run: continue it with "
                "--resume, or choose another OUTPUT_DIR"
            )
        self.checkpointer.remove_unfinished()
        usable = self.checkpointer.find_usable_checkpoint() if resume else ""
        if not usable:
            self.checkpointer.load(self.cfg.MODEL.WEIGHTS, checkpointables=[])
            if self.checkpointer.from_torchvision:
                warn_of_torchvision(self.cfg)
            return
        # Compare before any state is loaded into a network that it may not fit. With mmap the
        # tensors are not read.
        self._check_same_run(usable, torch.load(usable, "cpu", weights_only=True, mmap=True))
        self.start_iter = self.checkpointer.load(usable)["iteration"] + 1
        self.iter = self.start_iter - 1

    def _check_same_run(self, path: str, saved: Dict[str, Any]) -> None:
        """Refuse a checkpoint that cannot be continued bit for bit; warn of other hardware."""
        if "computed_by" not in saved:
            raise NATSError(
                f"{path} cannot be resumed from: this program did not write it. Choose another "
                "OUTPUT_DIR, or give it as MODEL.WEIGHTS without --resume"
            )
        differences = config_differences(saved["config"], self.given_cfg)
        if differences:
            raise NATSError(
                f"{self.cfg.OUTPUT_DIR} contains a run with other settings: "
                f"{'; '.join(differences[:5])}. Restore the settings, or choose another OUTPUT_DIR "
                f"and, to start from its weights, MODEL.WEIGHTS {path}"
            )
        computers, processes = saved["computed_by"], comm.get_world_size()
        if len(computers) != processes:
            raise NATSError(
                f"{path} was written by {len(computers)} processes and cannot be resumed by "
                f"{processes}: start {len(computers)}, or a new run in another OUTPUT_DIR with "
                "MODEL.WEIGHTS set to it"
            )
        compute_as(computers[comm.get_rank()], self.cfg.MODEL.DEVICE)

    def state_dict(self) -> Dict[str, Any]:
        return {
            "hooks": TrainerBase.state_dict(self).get("hooks", {}),
            "phases": self.phases.state_dict(),
            "objectives": {name: o.state_dict() for name, o in self.objectives.items()},
            "rng": self._random_states,
            "loss_normalizers": self._normalizers,
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        for hook in self._hooks:
            name = type(hook).__qualname__
            if name in state["hooks"]:
                hook.load_state_dict(state["hooks"][name])
        self.phases.load_state_dict(state["phases"])  # may exchange a loader
        for name, objective in self.objectives.items():
            objective.load_state_dict(state["objectives"][name])
        # with SEED -1 this run has just drawn another one
        self.seed = self.objectives["weight"].loader.seed
        normalizer = state["loss_normalizers"][comm.get_rank()]
        if normalizer is not None:
            self.model.loss_normalizer = normalizer
        set_random_states(state["rng"][comm.get_rank()], self._device)

    # -- what DefaultTrainer calls ----------------------------------------------------------------

    def train(self):
        try:
            results = super().train()
        finally:
            # Otherwise the garbage collector waits for each loader process, 10 s and in vain
            if not self._stop_now:  # then they are killed at exit
                for objective in self.objectives.values():
                    objective.close()
        logger.info(f"Training done: wrote {os.path.join(self.cfg.OUTPUT_DIR, 'model_final.pth')}")
        return results

    def build_hooks(self) -> List[HookBase]:
        """Detectron2's default hooks, except that all ranks together write the checkpoints."""
        eval_period = self.cfg.TEST.EVAL_PERIOD
        built = [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            # before the last checkpoint and the last evaluation, which use it
            AverageHook(self.cfg.SOLVER.AVERAGE_LAST),
            CheckpointHook(self.cfg.SOLVER.CHECKPOINT_PERIOD, eval_period),
            EvalHook(eval_period, self._evaluate),
        ]
        if comm.is_main_process():
            built.append(hooks.PeriodicWriter(self.build_writers(), self.cfg.RUN.LOG_PERIOD))
        return built

    def _evaluate(self) -> Dict[str, Any]:
        # evaluating must not change the run
        with preserved_random_states():
            self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        try:
            return super().build_model(with_cpu_sync_bn(cfg, comm.get_world_size()))
        except (AssertionError, KeyError) as error:  # Detectron2's, for settings that do not fit
            raise NATSError(f"this detector cannot be built: {one_line(error)}") from error

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> EvaluationLoader:
        return EvaluationLoader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str):
        return build_evaluator(cfg, dataset_name)
