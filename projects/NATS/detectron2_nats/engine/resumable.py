"""A `DefaultTrainer` whose runs can be stopped at any point and resumed bit for bit.

It adds to Detectron2's: checkpoints with each rank's random states and the loaders' positions,
steps that are skipped when a loss or gradient is not finite, a clean stop on a signal, and training
on several CPU processes. The search and plain retraining share it.
"""

import logging
import math
import os
import resource
import time
import weakref
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from ..config import check_config, config_differences, scaled_to_processes, with_norms_for
from ..data.overlap import warn_of_test_images
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
from .processes import stop_requested

logger = logging.getLogger(__name__)


class _LossModule(nn.Module):
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


@dataclass
class Phase:
    """One kind of step: which losses, of which data, change which parameters.

    Attributes:
        name: "" for the weight step; else the prefix of everything that the step logs.
        losses: callable, batch → dict of losses.
        loader: endless iterable of batches.
        optimizer: of the parameters that the step changes.
        scaler: loss scaling of this kind of step (active only in float16).
        bad_in_row: steps skipped since the last one taken, for a loss or gradient that is not
            finite.
        bad_total: steps skipped in the whole run.
    """

    name: str
    losses: Any
    loader: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    bad_in_row: int = 0
    bad_total: int = 0
    _iterator: Optional[Iterator] = None

    def next_batch(self) -> List[dict]:
        if self._iterator is None:
            self._iterator = iter(self.loader)
        return next(self._iterator)

    def close(self) -> None:
        """End the loader's processes. The next batch starts new ones."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

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


class ResumableTrainer(DefaultTrainer):
    """Detectron2's trainer for one detector, exactly resumable.

    ``trainer.model`` is the detector itself on every rank. The data-parallel wrapper is internal.

    Args:
        cfg: a config with the keys of :func:`add_nats_config`.

    Raises:
        NATSError: bad input; raised before training starts.
    """

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)
        check_config(cfg)
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
        self._loss_module = _LossModule(model)
        self.weights = self.new_phase("", _distributed(self._loss_module), loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR, run=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self._stop_now = False
        self.register_hooks(self.build_hooks())

    # -- what a subclass overrides ----------------------------------------------------------------

    def prepare_model(self, model: nn.Module) -> None:
        """Called once, before the optimizer is built."""

    def phases(self) -> List[Phase]:
        """All kinds of step, for checkpoints."""
        return [self.weights]

    def after_checkpoint(self) -> None:
        """Called on all ranks after a checkpoint has been written."""

    def run_step(self) -> None:
        self.weight_step()

    def weight_step(self) -> None:
        """Take an SGD step on the weights, on a batch of ``DATASETS.TRAIN``."""
        self.take_step(self.weights)

    # -- steps ------------------------------------------------------------------------------------

    def new_phase(self, name: str, losses, loader, optimizer) -> Phase:
        """A phase in the precision of ``SOLVER.AMP``."""
        amp = self.cfg.SOLVER.AMP
        loss_scaling = amp.ENABLED and amp.PRECISION == "float16"
        scaler = torch.amp.GradScaler(self._device.type, enabled=loss_scaling)
        return Phase(name, losses, loader, optimizer, scaler)

    def take_step(self, phase: Phase) -> None:
        """Take one step of `phase`, unless its loss or gradient is not finite on some rank."""
        start = time.perf_counter()
        batch = phase.next_batch()
        data_time = time.perf_counter() - start

        self._forward_state.save()
        losses = self._compute_gradients(phase, batch)
        self.after_backward()
        phase.scaler.unscale_(phase.optimizer)

        means = self._mean_over_ranks(losses)
        loss_finite = math.isfinite(sum(means.values()))
        if loss_finite and _finite_gradients(phase.parameters):
            phase.scaler.step(phase.optimizer)
            phase.bad_in_row = 0
        else:
            self._forward_state.restore()
            # float16's loss scale starts too high on purpose: steps skipped to find it do not count
            if not loss_finite or phase.scaler.get_scale() <= 1.0:
                phase.bad_in_row += 1
                phase.bad_total += 1
                self._report_bad_step(phase, means)
        phase.scaler.update()
        phase.optimizer.zero_grad(set_to_none=True)  # free the memory for the other phase

        prefix = f"{phase.name}/" if phase.name else ""
        if loss_finite:
            scalars = {f"{prefix}{name}": value for name, value in means.items()}
            self.storage.put_scalars(**scalars)
            self.storage.put_scalar(f"{prefix}total_loss", sum(means.values()))
        self.storage.put_scalar(f"{prefix}data_time", data_time)
        self.storage.put_scalar(f"{prefix}skipped_steps", phase.bad_total, smoothing_hint=False)

    def _compute_gradients(self, phase: Phase, batch: List[dict]) -> Dict[str, torch.Tensor]:
        """Forward and backward pass, gradients averaged over ranks; returns this rank's losses."""
        amp = self.cfg.SOLVER.AMP
        precision = getattr(torch, amp.PRECISION)
        with torch.autocast(self._device.type, precision, enabled=amp.ENABLED):
            losses = phase.losses(batch)
            total = sum(losses.values())
        phase.optimizer.zero_grad(set_to_none=True)
        phase.scaler.scale(total).backward()
        self.reduce_gradients(phase)
        return losses

    def rehearse_step(self, phase: Phase) -> str:
        """Compute the gradient of the next step of `phase`, then restore everything it changed.

        Call it on all ranks, in :func:`.alpha.alpha_training`. The run then continues as if nothing
        had happened, bit for bit.

        Returns:
            Time and peak memory, as text.
        """
        states, loader_state = random_states(self._device), phase.loader.state_dict()
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            batch = phase.next_batch()
        finally:
            phase.close()
        start = time.perf_counter()
        with EventStorage(-1):  # what it logs belongs to no iteration
            self._compute_gradients(phase, batch)
        if on_gpu:
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - start
        phase.optimizer.zero_grad(set_to_none=True)
        phase.loader.load_state_dict(loader_state)
        set_random_states(states, self._device)
        if on_gpu:
            peak = f"{torch.cuda.max_memory_allocated(self._device) / 2**20:.0f} MiB of the GPU"
        else:
            peak = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB"
        return f"{seconds:.2f} s, peak memory {peak}"

    def reduce_gradients(self, phase: Phase) -> None:
        """Called between backward and step. Data parallelism has averaged the weights' already."""

    def _mean_over_ranks(self, losses: Dict[str, torch.Tensor]) -> Dict[str, float]:
        """Mean losses; NaN where a rank lacks a loss because its forward pass raised.

        The same message tells whether any rank was asked to stop.
        """
        values = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
        ranks = comm.all_gather((stop_requested(), dict(zip(losses, values))))
        self._stop_now = any(stop for stop, _ in ranks)
        names = dict.fromkeys(name for _, own in ranks for name in own)  # the same on all ranks
        return {
            name: sum(own.get(name, math.nan) for _, own in ranks) / len(ranks) for name in names
        }

    def _report_bad_step(self, phase: Phase, means: Dict[str, float]) -> None:
        name = phase.name or "weight"
        logger.warning(
            f"iteration {self.iter}: the {name} step was not taken, because its loss or gradient "
            f"is not finite ({phase.bad_in_row} in a row, {phase.bad_total} in total): {means}"
        )
        if phase.bad_in_row >= self.cfg.RUN.MAX_BAD_STEPS:
            last = self.checkpointer.get_checkpoint_file() or "none yet"
            raise NATSError(
                f"{phase.bad_in_row} {name} steps in a row had a loss or gradient that is not "
                f"finite, up to iteration {self.iter}: check the data and continue with --resume, "
                "or start a new run at a lower learning rate, in another OUTPUT_DIR with "
                f"MODEL.WEIGHTS set to the last good checkpoint, {last}"
            )

    # -- checkpoints ------------------------------------------------------------------------------

    def save_checkpoint(self, name: str) -> None:
        """Write a checkpoint. Call it on all ranks."""
        for phase in self.phases():
            phase.loader.merge_bad_files()
        self._random_states = comm.gather(random_states(self._device))
        self._normalizers = comm.gather(self._forward_state.normalizer)
        self.checkpointer.save(
            name,
            iteration=self.iter,
            config=self.given_cfg.dump(),
            batch_scale=self._batch_scale,
            computed_by=comm.gather(computed_by(self.cfg.MODEL.DEVICE)),
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
        self.check_same_run(saved["config"])
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
        settings = [phase.settings for phase in self.phases()]
        loaded = self.checkpointer.load(usable)
        self.start_iter = loaded["iteration"] + 1
        if loaded["batch_scale"] != self._batch_scale:
            self._rescale_steps(loaded["batch_scale"] / self._batch_scale)
        # A checkpoint contains the settings of the run that wrote it, too. This run's apply.
        for phase, own in zip(self.phases(), settings):
            phase.settings = own
        self.scheduler.base_lrs = rates
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_lr()):
            group["lr"] = rate
        self.iter = self.start_iter - 1

    def _rescale_steps(self, factor: float) -> None:
        """Continue at the same image, although a step now has another number of images.

        ``SOLVER.REFERENCE_WORLD_SIZE`` scales batch, learning rates and length to the number of
        processes. A checkpoint counts in the steps of the processes that wrote it.

        Args:
            factor: steps of this run per step of the checkpoint.
        """
        old = self.start_iter
        self.start_iter = self.scheduler.last_epoch = min(round(old * factor), self.max_iter)
        for phase in self.phases():
            phase.loader.batches = round(phase.loader.batches * factor)
        for hook in self._hooks:
            if isinstance(hook, AverageHook):
                hook.rescale(factor)
        logger.warning(
            f"the checkpoint's {old} iterations correspond to {self.start_iter} of {self.max_iter} "
            f"with {self.cfg.SOLVER.IMS_PER_BATCH} images each: the run continues there"
        )

    def check_same_run(self, saved_config: str) -> None:
        """Called on resume with the config of the run that wrote the checkpoint."""
        for line in config_differences(saved_config, self.given_cfg):
            logger.warning(f"resuming with a different setting: {line}")

    # -- what DefaultTrainer calls ----------------------------------------------------------------

    def train(self):
        try:
            results = super().train()
        finally:
            # Otherwise the garbage collector waits for each loader process, 10 s and in vain
            if not self._stop_now:  # then they are killed at exit
                for phase in self.phases():
                    phase.close()
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
            "phases": {phase.name or "weights": phase.state_dict() for phase in self.phases()},
            "rng": self._random_states,
            "loss_normalizers": self._normalizers,
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        for hook in self._hooks:
            name = type(hook).__qualname__
            if name in state["hooks"]:
                hook.load_state_dict(state["hooks"][name])
        for phase in self.phases():
            phase.load_state_dict(state["phases"][phase.name or "weights"])
        self.seed = self.weights.loader.seed  # with SEED -1 this run has just drawn another one
        normalizers = state["loss_normalizers"]
        self._forward_state.normalizer = normalizers[comm.get_rank() % len(normalizers)]
        if len(state["rng"]) == comm.get_world_size():
            set_random_states(state["rng"][comm.get_rank()], self._device)
        else:
            logger.warning(
                f"the checkpoint was written by {len(state['rng'])} processes and is resumed by "
                f"{comm.get_world_size()}: the run continues, but not bit for bit"
            )


def _distributed(module: nn.Module) -> nn.Module:
    """`module`, averaging gradients over ranks."""
    if comm.get_world_size() == 1:
        return module
    device = next(module.parameters()).device
    ids = [device] if device.type == "cuda" else None
    # Views: else each gradient is kept twice, once in the bucket that the ranks exchange
    return DistributedDataParallel(
        module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def _sizes(weights: Dict[str, torch.Tensor], optimizer: Dict[str, Any]):
    """What a run and its checkpoint must have in common, from both state dicts."""
    return (
        {name: tensor.shape for name, tensor in weights.items()},
        [len(group["params"]) for group in optimizer["param_groups"]],
    )


def _finite_gradients(parameters: List[nn.Parameter]) -> bool:
    """Whether all gradients are finite, with one transfer from the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    return bool(torch.stack([norm.float() for norm in norms]).sum().isfinite())
