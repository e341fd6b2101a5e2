"""Compare the config of a run with the one of a checkpoint."""

from typing import List

from detectron2.config import CfgNode

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


def config_differences(saved: str, cfg: CfgNode) -> List[str]:
    """A line "KEY: old, now new" for each setting that changes what is computed.

    Args:
        saved: the old config, as dumped.
    """
    old, new = (flat(CfgNode.load_cfg(dump)) for dump in (saved, cfg.dump()))
    old = {**flat(load_config("")), **old}  # keys that this version has and the old one had not
    return [
        f"{key}: {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(_FREE_KEYS)
    ]
