"""A `DefaultTrainer` whose runs can be stopped at any point and resumed bit for bit.

It adds to Detectron2's: checkpoints with each rank's random states and the loaders' positions,
steps that are skipped when a loss or gradient is not finite, a clean stop on a signal, and training
on several CPU processes. The search and plain retraining share it.
"""

import logging
import math
import os
import time
import weakref
from typing import Any, Dict, List

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm

from ..config.comparing import config_differences, scaled_to_processes, with_norms_for
from ..config.keys import check_config
from ..data.overlap import warn_of_test_images
from ..data.registry import check_data
from ..errors import NATSError
from ..method.forward_state import ForwardState
from .checkpoint import SafeCheckpointer
from .determinism import (
    compute_as,
    computed_by,
    preserved_random_states,
    random_states,
    set_random_states,
)
from .evaluation import build_evaluator
from .hooks import AverageHook, CheckpointHook, EvalHook
from .loader import EvaluationLoader, build_resumable_loader, dataset_dicts
from .steps import LossModule, Objective, distributed, finite_gradients, mean_over_ranks

logger = logging.getLogger(__name__)


class ResumableTrainer(DefaultTrainer):
    """Detectron2's trainer for one detector, exactly resumable.

    ``trainer.model`` is the detector itself on every rank. The data-parallel wrapper is internal.

    Args:
        cfg: a config with the keys of :func:`add_nats_config`.

    Raises:
        NATSError: bad input; raised before training starts.
    """

    DATA = ("TRAIN", "TEST")  # keys of cfg.DATASETS that a run reads; all must have equal classes

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)
        check_config(cfg)
        check_data(cfg, self.DATA)
        self.given_cfg = cfg
        self.cfg = cfg = scaled_to_processes(cfg, comm.get_world_size())
        self._batch_scale = cfg.SOLVER.IMS_PER_BATCH / (self.given_cfg.SOLVER.IMS_PER_BATCH or 1)
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
        loader = build_resumable_loader(
            cfg,
            dataset_dicts(cfg, cfg.DATASETS.TRAIN),
            total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
            seed=self.seed,
        )
        warn_of_test_images(cfg.DATASETS.TEST, loader.files, "DATASETS.TRAIN")
        # DefaultTrainer's properties read model, loader and optimizer from it; its steps are unused
        self._trainer = SimpleTrainer(model, loader, optimizer)
        self._forward_state = ForwardState(model)
        self._loss_module = LossModule(model)
        losses = distributed(self._loss_module)
        self.weight_objective = self.new_objective("weight", losses, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR, run=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self._stop_now = False
        self.register_hooks(self.build_hooks())

    # -- what a subclass overrides ----------------------------------------------------------------

    def prepare_model(self, model: nn.Module) -> None:
        """Called once, before the optimizer is built."""

    def objectives(self) -> Dict[str, Objective]:
        """All kinds of step, under their names in checkpoints."""
        return {"weights": self.weight_objective}

    def after_checkpoint(self) -> None:
        """Called on all ranks after a checkpoint has been written."""

    def run_step(self) -> None:
        self.weight_step()

    def weight_step(self) -> None:
        """Take an SGD step on the weights, on a batch of ``DATASETS.TRAIN``."""
        self.take_step(self.weight_objective)

    # -- steps ------------------------------------------------------------------------------------

    def new_objective(self, name: str, losses, loader, optimizer, **more) -> Objective:
        """An objective in the precision of ``SOLVER.AMP``; see :class:`.steps.Objective`."""
        amp = self.cfg.SOLVER.AMP
        return Objective(name, losses, loader, optimizer, self._device, amp, **more)

    def take_step(self, objective: Objective) -> None:
        """Take one step, unless its loss or gradient is not finite on some rank."""
        start = time.perf_counter()
        batch = objective.next_batch()
        data_time = time.perf_counter() - start

        self._forward_state.save()
        losses = objective.compute_gradients(batch)
        self.after_backward()
        objective.scaler.unscale_(objective.optimizer)

        means, self._stop_now = mean_over_ranks(losses)
        loss_finite = math.isfinite(sum(means.values()))
        if loss_finite and finite_gradients(objective.parameters):
            objective.scaler.step(objective.optimizer)
            objective.bad_in_row = 0
        else:
            self._forward_state.restore()
            # float16's loss scale starts too high on purpose: steps skipped to find it do not count
            if not loss_finite or objective.scaler.get_scale() <= 1.0:
                objective.bad_in_row += 1
                objective.bad_total += 1
                self._report_bad_step(objective, means)
        objective.scaler.update()
        objective.optimizer.zero_grad(set_to_none=True)  # free the memory for the other objective

        prefix = objective.prefix
        if loss_finite:
            scalars = {f"{prefix}{name}": value for name, value in means.items()}
            self.storage.put_scalars(**scalars)
            self.storage.put_scalar(f"{prefix}total_loss", sum(means.values()))
        self.storage.put_scalar(f"{prefix}data_time", data_time)
        self.storage.put_scalar(f"{prefix}skipped_steps", objective.bad_total, smoothing_hint=False)

    def _report_bad_step(self, objective: Objective, means: Dict[str, float]) -> None:
        name, in_row = objective.name, objective.bad_in_row
        logger.warning(
            f"iteration {self.iter}: the {name} step was not taken, because its loss or gradient "
            f"is not finite ({in_row} in a row, {objective.bad_total} in total): {means}"
        )
        if in_row >= self.cfg.RUN.MAX_BAD_STEPS:
            last = self.checkpointer.get_checkpoint_file() or "none yet"
            raise NATSError(
                f"{in_row} {name} steps in a row had a loss or gradient that is not "
                f"finite, up to iteration {self.iter}: check the data and continue with --resume, "
                "or start a new run at a lower learning rate, in another OUTPUT_DIR with "
                f"MODEL.WEIGHTS set to the last good checkpoint, {last}"
            )

    # -- checkpoints ------------------------------------------------------------------------------

    def save_checkpoint(self, name: str) -> None:
        """Write a checkpoint. Call it on all ranks."""
        for objective in self.objectives().values():
            objective.loader.merge_bad_files()
        self._random_states = comm.gather(random_states(self._device))
        self._normalizers = comm.gather(self._forward_state.normalizer)
        self.checkpointer.save(
            name,
            iteration=self.iter,
            config=self.given_cfg.dump(),
            batch_scale=self._batch_scale,
            computed_by=comm.gather(computed_by(self.cfg.MODEL.DEVICE)),
            classes=MetadataCatalog.get(self.cfg.DATASETS.TRAIN[0]).get("thing_classes", []),
        )
        self.checkpointer.prune(self.cfg.RUN.KEEP_CHECKPOINTS)
        comm.synchronize()
        self.after_checkpoint()

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
            return
        # Compare the configs before any state is loaded into a network that it may not fit. With
        # mmap the tensors are not read.
        saved = torch.load(usable, map_location="cpu", weights_only=True, mmap=True)
        if "batch_scale" not in saved:
            raise NATSError(
                f"{usable} cannot be resumed from: this version of the program did not write it. "
                "Choose another OUTPUT_DIR, or give it as MODEL.WEIGHTS without --resume"
            )
        self.check_same_run(saved)
        self._check_same_data(usable, saved)
        old_optimizer = saved["run"]["phases"]["weights"]["optimizer"]
        if _sizes(saved["model"], old_optimizer) != _sizes(
            self.model.state_dict(), self.optimizer.state_dict()
        ):
            raise NATSError(
                f"{usable} is of other parameters: of the settings that the warnings name, one "
                "cannot change on --resume. Change it back, or choose another OUTPUT_DIR"
            )
        computers = saved["computed_by"]
        del saved
        if len(computers) == comm.get_world_size():
            compute_as(computers[comm.get_rank()], self.cfg.MODEL.DEVICE)
        rates = list(self.scheduler.base_lrs)
        settings = [objective.settings for objective in self.objectives().values()]
        loaded = self.checkpointer.load(usable)
        self.start_iter = loaded["iteration"] + 1
        if loaded["batch_scale"] != self._batch_scale:
            self._rescale_steps(loaded["batch_scale"] / self._batch_scale)
        # A checkpoint contains the settings of the run that wrote it, too. This run's apply.
        for objective, own in zip(self.objectives().values(), settings):
            objective.settings = own
        self.scheduler.base_lrs = rates
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_lr()):
            group["lr"] = rate
        self.iter = self.start_iter - 1

    def _check_same_data(self, path: str, saved: Dict[str, Any]) -> None:
        """Refuse other data behind the same settings. (Other settings have been spoken of.)"""
        decisive = ("DATASETS.", "DATALOADER.", "MODEL.")
        if any(d.startswith(decisive) for d in config_differences(saved["config"], self.given_cfg)):
            return
        for name, objective in self.objectives().items():
            old = saved["run"]["phases"][name]["loader"]
            new = objective.loader.state_dict()
            if old.get("digest", new["digest"]) != new["digest"]:  # older versions wrote none
                key = "TRAIN" if name == "weights" else "CALIBRATION"
                raise NATSError(
                    f"{path} is of a run on other data: DATASETS.{key} had {old['images']} images "
                    f"(digest {old['digest']}), it has {new['images']} ({new['digest']}). Restore "
                    "the annotation file, or choose another OUTPUT_DIR"
                )

    def _rescale_steps(self, factor: float) -> None:
        """Continue at the same image, although a step now has another number of images.

        ``SOLVER.REFERENCE_WORLD_SIZE`` scales batch, learning rates and length to the number of
        processes. A checkpoint counts in the steps of the processes that wrote it.

        Args:
            factor: steps of this run per step of the checkpoint.
        """
        old = self.start_iter
        self.start_iter = self.scheduler.last_epoch = min(round(old * factor), self.max_iter)
        for objective in self.objectives().values():
            objective.loader.batches = round(objective.loader.batches * factor)
        for hook in self._hooks:
            if isinstance(hook, AverageHook):
                hook.rescale(factor)
        logger.warning(
            f"the checkpoint's {old} iterations correspond to {self.start_iter} of {self.max_iter} "
            f"with {self.cfg.SOLVER.IMS_PER_BATCH} images each: the run continues there"
        )

    def check_same_run(self, saved: Dict[str, Any]) -> None:
        """Called on resume with the checkpoint, before anything of it is loaded."""
        for line in config_differences(saved["config"], self.given_cfg):
            logger.warning(f"resuming with a different setting: {line}")

    # -- what DefaultTrainer calls ----------------------------------------------------------------

    def train(self):
        try:
            results = super().train()
        finally:
            # Otherwise the garbage collector waits for each loader process, 10 s and in vain
            if not self._stop_now:  # then they are killed at exit
                for objective in self.objectives().values():
                    objective.close()
        logger.info(f"Training done: wrote {os.path.join(self.cfg.OUTPUT_DIR, 'model_final.pth')}")
        return results

    def build_hooks(self) -> List[HookBase]:
        """Detectron2's default hooks, except that all ranks together write the checkpoints."""
        test, precise_bn = self.cfg.TEST, None
        if test.PRECISE_BN.ENABLED and hooks.get_bn_modules(self.model):
            loader = self.build_train_loader(self.cfg)
            precise_bn = hooks.PreciseBN(
                test.EVAL_PERIOD, self.model, loader, test.PRECISE_BN.NUM_ITER
            )
        built = [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            # before precise batch norm, the last checkpoint and the last evaluation, which use it
            AverageHook(self.cfg.SOLVER.AVERAGE_LAST),
            precise_bn,
            CheckpointHook(self.cfg.SOLVER.CHECKPOINT_PERIOD, test.EVAL_PERIOD),
            EvalHook(test.EVAL_PERIOD, self._evaluate),
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
        return super().build_model(with_norms_for(cfg, comm.get_world_size()))

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """A loader for precise batch norm, separate from the training's own."""
        dicts = dataset_dicts(cfg, cfg.DATASETS.TRAIN)
        size = cfg.SOLVER.IMS_PER_BATCH
        return build_resumable_loader(cfg, dicts, total_batch_size=size, seed=max(cfg.SEED, 0))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> EvaluationLoader:
        return EvaluationLoader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str):
        return build_evaluator(cfg, dataset_name)

    def state_dict(self) -> Dict[str, Any]:
        return {
            "hooks": TrainerBase.state_dict(self).get("hooks", {}),
            "phases": {name: o.state_dict() for name, o in self.objectives().items()},
            "rng": self._random_states,
            "loss_normalizers": self._normalizers,
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        for hook in self._hooks:
            name = type(hook).__qualname__
            if name in state["hooks"]:
                hook.load_state_dict(state["hooks"][name])
        for name, objective in self.objectives().items():
            objective.load_state_dict(state["phases"][name])
        self.seed = (
            self.weight_objective.loader.seed
        )  # with SEED -1 this run has just drawn another one
        normalizers = state["loss_normalizers"]
        self._forward_state.normalizer = normalizers[comm.get_rank() % len(normalizers)]
        if len(state["rng"]) == comm.get_world_size():
            set_random_states(state["rng"][comm.get_rank()], self._device)
        else:
            logger.warning(
                f"the checkpoint was written by {len(state['rng'])} processes and is resumed by "
                f"{comm.get_world_size()}: the run continues, but not bit for bit"
            )


def _sizes(weights: Dict[str, torch.Tensor], optimizer: Dict[str, Any]):
    """What a run and its checkpoint must have in common, from both state dicts."""
    return (
        # older versions wrote no choice
        {n: tensor.shape for n, tensor in weights.items() if not n.endswith(".choice")},
        [len(group["params"]) for group in optimizer["param_groups"]],
    )
