"""Compare the config of a run with the one of a checkpoint, and fit it to a number of processes."""

from typing import List, Sequence

import torch

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from .keys import flat
from .reading import load_config

# Settings (or beginnings of their names) that do not change what is computed.
_FREE_KEYS = (
    "OUTPUT_DIR",
    "DATALOADER.NUM_WORKERS",
    "DATASETS.REGISTER",
    "DATASETS.TEST",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "RUN.",
    "SEARCH.RETRAIN_CONFIG",
    "SEARCH.SCORE_IMAGES",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.",
    "VIS_PERIOD",
)


def config_differences(saved: str, cfg: CfgNode, free: Sequence[str] = _FREE_KEYS) -> List[str]:
    """A line "KEY: old, now new" for each setting that changes what is computed.

    Args:
        saved: the old config, as dumped.
        free: settings, or beginnings of their names, that may differ.
    """
    old, new = (flat(CfgNode.load_cfg(dump)) for dump in (saved, cfg.dump()))
    old = {**flat(load_config("")), **old}  # keys that this version has and the old one had not
    return [
        f"{key}: {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(tuple(free))
    ]


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


def with_norms_for(cfg: CfgNode, processes: int) -> CfgNode:
    """Replace SyncBN, which supports only GPUs, by Detectron2's for CPU processes (same keys)."""
    if processes == 1 or cfg.MODEL.DEVICE.startswith("cuda"):
        return cfg
    cfg = cfg.clone()
    norms = [key for key, value in flat(cfg).items() if key.endswith(".NORM") and value == "SyncBN"]
    cfg.merge_from_list([word for key in norms for word in (key, "naiveSyncBN")])
    return cfg


def falls_back_to_cpu(cfg: CfgNode) -> bool:
    """Set ``MODEL.DEVICE`` to the CPU where it is CUDA and PyTorch finds no GPU; whether it did."""
    without = cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available()
    if without:
        cfg.MODEL.DEVICE = "cpu"
    return without
