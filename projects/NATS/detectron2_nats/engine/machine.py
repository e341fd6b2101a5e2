"""Fit a config and its processes to the machine: device, GPUs, cores, number of processes."""

import logging
import os

import torch

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from ..config.keys import flat
from ..errors import NATSError, one_line

logger = logging.getLogger(__name__)


def set_usable_device(cfg: CfgNode) -> None:
    """Set ``MODEL.DEVICE`` to the CPU, with a warning, if it is CUDA and PyTorch finds no GPU."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning(f"computing on the CPU, because PyTorch finds no GPU: {why_no_cuda()}")
        cfg.MODEL.DEVICE = "cpu"


def why_no_cuda() -> str:
    """PyTorch's reason for using no GPU."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:  # PyTorch without CUDA, or no usable GPU
        return one_line(error)
    return "no reason given"


def check_gpus(cfg: CfgNode, processes: int) -> None:
    """Raise NATSError if the processes are for GPUs, and this machine has too few."""
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        return
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if here < processes:
        reason = "" if here else f" ({why_no_cuda()})"
        raise NATSError(
            f"processes on this machine: {processes}, GPUs that PyTorch can use here: {here}"
            f"{reason}. Start fewer, or add MODEL.DEVICE cpu to compute on the CPU"
        )


def share_out_cores(processes: int) -> None:
    """Give each process on this machine its share of the cores.

    The last bit of a sum depends on the number of threads, so OMP_NUM_THREADS goes first.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def scaled_to_processes(cfg: CfgNode, processes: int) -> CfgNode:
    """Apply Detectron2's ``SOLVER.REFERENCE_WORLD_SIZE``, also to this project's keys."""
    scaled = DefaultTrainer.auto_scale_workers(cfg, processes)
    if scaled is not cfg:
        scaled = scaled.clone()
        scaled.defrost()
        factor = scaled.SOLVER.IMS_PER_BATCH / cfg.SOLVER.IMS_PER_BATCH
        scaled.SOLVER.BASE_LR_END *= factor
        scaled.SEARCH.ALPHA_LR *= factor  # α moves by rate × steps, and the steps are scaled
        if cfg.SEARCH.ALPHA_IMS_PER_BATCH:
            images = max(1, round(cfg.SEARCH.ALPHA_IMS_PER_BATCH * factor))
            scaled.SEARCH.ALPHA_IMS_PER_BATCH = images
        scaled.freeze()
    return scaled


def with_cpu_sync_bn(cfg: CfgNode, processes: int) -> CfgNode:
    """Replace SyncBN, which supports only GPUs, by Detectron2's for CPU processes (same keys)."""
    if processes == 1 or cfg.MODEL.DEVICE.startswith("cuda"):
        return cfg
    cfg = cfg.clone()
    norms = [key for key, value in flat(cfg).items() if key.endswith(".NORM") and value == "SyncBN"]
    cfg.merge_from_list([word for key in norms for word in (key, "naiveSyncBN")])
    return cfg
