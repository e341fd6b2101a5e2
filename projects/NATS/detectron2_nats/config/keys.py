"""Every config key of the project, with its default and meaning, and what its value must be."""

import difflib
import re
from typing import Any, Dict

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY

from ..errors import NATSError
from ..method.search_space import CONVS

DEFAULT_NUM_GROUPS = 16

# What Detectron2 knows by name, and keeps in no registry.
_SCHEDULERS = ["WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"]
_NORMS = ["", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N"]


def add_nats_config(cfg: CfgNode) -> None:
    """Add the project's keys to a Detectron2 config, in place."""
    # -- the backbone: used if MODEL.BACKBONE.NAME is "build_nats_backbone" ---------------------
    cfg.MODEL.NATS = CfgNode()
    # Any registered builder.
    cfg.MODEL.NATS.BASE_BACKBONE = "build_resnet_fpn_backbone"
    # List of [layer name, [[output channels, d_h, d_w], ...]], written by nats-export. If not
    # empty, this frozen network is built. If empty, the super-network is built.
    cfg.MODEL.NATS.ARCHITECTURE = []
    # Searched convs: patterns of their names, such as ["res4.*", "fpn_output*"]. The 3x3 convs of a
    # residual network are called res2.0.conv2 and so on, others by their path in the backbone.
    cfg.MODEL.NATS.CONVS = list(CONVS)
    # The paper's genotype set "A", "B" or "C", or a list of dilation pairs per pattern, such as
    # [[[1, 1], [3, 3]], [[1, 1], [3, 3]], [[1, 1], [5, 5]]]. None means "C". (If the default were a
    # string, Detectron2 would refuse a list, because its type differs.)
    cfg.MODEL.NATS.SPACE = None
    # Channel groups per conv. Each chooses for itself; 1 is path-level search.
    cfg.MODEL.NATS.NUM_GROUPS = DEFAULT_NUM_GROUPS
    # If > 0: output channels per group, instead of NUM_GROUPS. (Do not change both.)
    cfg.MODEL.NATS.CHANNELS_PER_GROUP = 0
    # Use one weight for all genotypes instead of one replica per genotype.
    cfg.MODEL.NATS.SHARE_WEIGHTS = False
    # Each step draws one genotype per group, with probability softmax(α), instead of mixing them
    # all; one weight for all genotypes. Cheaper, and not the paper's: docs/method.md.
    cfg.MODEL.NATS.SAMPLE = False

    # -- data -----------------------------------------------------------------------------------
    # The split that trains α. It must not share any image with DATASETS.TRAIN.
    cfg.DATASETS.CALIBRATION = ["coco_2014_valminusminival"]
    # Your own COCO-format data: [[name, annotation json, image folder], ...].
    cfg.DATASETS.REGISTER = []
    # Detectron2's RandomSubsetTrainingSampler reads this key, but its defaults lack it.
    if "RANDOM_SUBSET_RATIO" not in cfg.DATALOADER:
        cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.0

    # -- the search -----------------------------------------------------------------------------
    cfg.SEARCH = CfgNode()
    # Adam for α, with a constant learning rate (section 4.2).
    cfg.SEARCH.ALPHA_LR = 0.01
    cfg.SEARCH.ALPHA_WEIGHT_DECAY = 1e-5
    # Fraction of the search after which α steps begin: 10 of 25 epochs.
    cfg.SEARCH.ALPHA_START = 0.4
    # Fraction of the run after which the choice is frozen: what is left of it trains the frozen
    # network on the images of both splits. For MODEL.NATS.SAMPLE. 1: the run is a search alone.
    cfg.SEARCH.FREEZE_AT = 1.0
    # Freeze before that, as soon as the search has decided (docs/search.md).
    cfg.SEARCH.FREEZE_WHEN_DECIDED = False
    # Images per α step, on all GPUs together. 0: as many as SOLVER.IMS_PER_BATCH.
    cfg.SEARCH.ALPHA_IMS_PER_BATCH = 0
    # "paper": channels are sorted by dilation. "voted": each group keeps its own channels.
    cfg.SEARCH.DECODE_ORDER = "paper"
    # Margin: a group leaves (1, 1) only if the softmax(α) of its best genotype exceeds that of
    # (1, 1) by more than this. 0: the paper's argmax.
    cfg.SEARCH.DECODE_MARGIN = 0.0
    # If > 0: each conv keeps so many dilations, those with the largest sum of softmax(α), and its
    # groups vote among these. Fewer run faster on a GPU; with 1 the frozen convs are plain ones.
    cfg.SEARCH.DECODE_AT_MOST = 0
    # The detector for which the search writes retrain.yaml: a path, or the name of a config in
    # Detectron2's zoo. Empty: the searched detector itself, with the search's schedule.
    cfg.SEARCH.RETRAIN_CONFIG = ""
    # What retraining starts from. "base": RETRAIN_CONFIG's MODEL.WEIGHTS, as in the paper.
    # "supernet": the super-network's own weights, which the search writes to frozen.pth. The
    # search then decodes in "voted" order, the only one that these weights fit.
    cfg.SEARCH.RETRAIN_WEIGHTS = "base"
    # Calibration images on which nats-search, at its end, scores what it found beside architectures
    # that need no search (docs/search.md). 0: none.
    cfg.SEARCH.SCORE_IMAGES = 16

    # -- runs: searches and retraining ------------------------------------------------------------
    # Precision of SOLVER.AMP: "float16" (with loss scaling) or "bfloat16".
    cfg.SOLVER.AMP.PRECISION = "float16"
    # Share of the iterations, at the end, over which the weights are averaged. Their mean is
    # evaluated and written to model_final.pth. 0: the last iteration's weights, as in Detectron2.
    cfg.SOLVER.AVERAGE_LAST = 0.0
    cfg.RUN = CfgNode()
    # Number of checkpoints to keep. Older ones are deleted.
    cfg.RUN.KEEP_CHECKPOINTS = 3
    # Iterations between two lines of the log.
    cfg.RUN.LOG_PERIOD = 20
    # The run stops if a larger share of a data set's image files is missing or damaged.
    cfg.RUN.MAX_BAD_DATA = 0.01
    # Iterations between two checks that all ranks hold the same α.
    cfg.RUN.RANK_CHECK_PERIOD = 100
    # of configs of before: now the first loss or gradient that is not finite ends a run
    cfg.register_deprecated_key("RUN.MAX_BAD_STEPS")


# What a value must be, where that can be said without the model and the data.
_CHOICES = {
    "INPUT.RANDOM_FLIP": ("none", "horizontal", "vertical"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "SEARCH.DECODE_ORDER": ("paper", "voted"),
    "SEARCH.RETRAIN_WEIGHTS": ("base", "supernet"),
    "SOLVER.AMP.PRECISION": ("float16", "bfloat16"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
}
_AT_LEAST = {
    "RUN.KEEP_CHECKPOINTS": 1,
    "RUN.LOG_PERIOD": 1,
    "RUN.RANK_CHECK_PERIOD": 1,
    "SEARCH.DECODE_AT_MOST": 0,
    "SEARCH.SCORE_IMAGES": 0,
    "SOLVER.MAX_ITER": 1,
}
_RULES = (
    ("MODEL.DEVICE", lambda v: re.fullmatch(r"cpu|cuda(:\d+)?|mps", v), "cpu, cuda or cuda:1"),
    ("SEARCH.ALPHA_START", lambda v: 0 <= v < 1, "a share of the search, below 1"),
    ("SEARCH.FREEZE_AT", lambda v: 0 < v <= 1, "a share of the run, above 0 and at most 1"),
    ("SOLVER.AVERAGE_LAST", lambda v: 0 <= v <= 1, "a share of the run, 0 to 1"),
    ("SOLVER.BASE_LR", lambda v: v > 0, "above 0"),
    ("TEST.AUG.ENABLED", lambda v: not v, "False: evaluate without, or by Detectron2's own tools"),
    ("TEST.PRECISE_BN.ENABLED", lambda v: not v, "False, since it could not be resumed exactly"),
)


def check_config(cfg: CfgNode) -> None:
    """Check every value that can be checked before the model is built and the data are read.

    Raises:
        NATSError: names the key and what it must be.
    """
    values = flat(cfg)
    for key, holds, expected in _RULES:
        _check(key, values[key], holds(values[key]), expected)
    for key, least in _AT_LEAST.items():
        _check(key, values[key], values[key] >= least, f"at least {least}")
    for key, choices in _CHOICES.items():
        _check(key, values[key], values[key] in choices, " or ".join(choices))
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    is_range = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    _check("INPUT.MIN_SIZE_TRAIN", sizes, not is_range or len(sizes) == 2, "two, for a range")
    _check_names(values)


def _check(key: str, value: Any, holds: Any, expected: str) -> None:
    if not holds:
        raise NATSError(f"{key} {value!r}: expected {expected}")


def genotype_set(cfg: CfgNode) -> Any:
    """``MODEL.NATS.SPACE``, or what its None means."""
    return "C" if cfg.MODEL.NATS.SPACE is None else cfg.MODEL.NATS.SPACE


def _check_names(values: Dict[str, Any]) -> None:
    """Check the names that Detectron2 looks up in its registries; suggests the nearest."""
    backbones = [name for name, _ in BACKBONE_REGISTRY]
    known = {
        "MODEL.META_ARCHITECTURE": [name for name, _ in META_ARCH_REGISTRY],
        "MODEL.BACKBONE.NAME": backbones,
        "MODEL.NATS.BASE_BACKBONE": backbones,
        "MODEL.ROI_HEADS.NAME": [name for name, _ in ROI_HEADS_REGISTRY],
        "SOLVER.LR_SCHEDULER_NAME": _SCHEDULERS,
        **{key: _NORMS for key in values if key.endswith(".NORM")},
    }
    for key, names in known.items():
        if values[key] not in names and isinstance(values[key], str):
            near = difflib.get_close_matches(values[key], names, 3, 0.5) or filter(None, names)
            raise NATSError(f"{key} {values[key]!r} is not known: expected {' or '.join(near)}")


def flat(node: CfgNode, prefix: str = "") -> Dict[str, Any]:
    """Dotted key → value, of all nodes."""
    values = {}
    for key, value in node.items():
        is_node = isinstance(value, CfgNode)
        values.update(flat(value, f"{prefix}{key}.") if is_node else {prefix + key: value})
    return values
