"""Every config key of the project, with its default and meaning; read and compare configs."""

import difflib
import os
import re
from typing import Any, Dict, List, Sequence

import torch

from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY

from .errors import NATSError, shown
from .files import read_yaml
from .method.search_space import STAGES

DEFAULT_NUM_GROUPS = 16

# What Detectron2 knows by name, and keeps in no registry.
_SCHEDULERS = ["WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"]
_NORMS = ["", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N"]


def add_nats_config(cfg: CfgNode) -> None:
    """Add the project's keys to a Detectron2 config, in place."""
    # -- the backbone: used if MODEL.BACKBONE.NAME is "build_nats_backbone" ---------------------
    cfg.MODEL.NATS = CfgNode()
    # Any registered builder. Of a network without residual stages (stages.py says what they are),
    # CONVS names what is searched.
    cfg.MODEL.NATS.BASE_BACKBONE = "build_resnet_fpn_backbone"
    # List of [layer name, [[output channels, d_h, d_w], ...]], written by nats-export. If not
    # empty, this frozen network is built. If empty, the super-network is built.
    cfg.MODEL.NATS.ARCHITECTURE = []
    # Searched stages.
    cfg.MODEL.NATS.STAGES = list(STAGES)
    # Instead of STAGES: patterns of module paths in the backbone, such as ["fpn_output*"]. All
    # convs that match are searched, and ARCHITECTURE's names are paths.
    cfg.MODEL.NATS.CONVS = []
    # The paper's genotype set "A", "B" or "C", or a list of dilation pairs per stage, such as
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
    # The run stops after this many steps in a row with non-finite losses or gradients.
    cfg.RUN.MAX_BAD_STEPS = 10
    # The run stops if a larger share of a data set's images or annotations is unusable.
    cfg.RUN.MAX_BAD_DATA = 0.01
    # Iterations between two checks that all ranks hold the same α.
    cfg.RUN.RANK_CHECK_PERIOD = 100


# What a value must be, where that can be said without the model and the data.
_RULES = (
    (
        "SEARCH.ALPHA_START",
        lambda v: 0 <= v < 1,
        "a fraction of the search, at least 0 and below 1",
    ),
    ("SEARCH.FREEZE_AT", lambda v: 0 < v <= 1, "a fraction of the run, above 0 and at most 1"),
    ("SEARCH.DECODE_AT_MOST", lambda v: v >= 0, "a number of dilations, or 0 for all"),
    ("SEARCH.RETRAIN_WEIGHTS", lambda v: v in ("base", "supernet"), "base or supernet"),
    ("SEARCH.SCORE_IMAGES", lambda v: v >= 0, "at least 0"),
    ("SOLVER.AMP.PRECISION", lambda v: v in ("float16", "bfloat16"), "float16 or bfloat16"),
    ("SOLVER.AVERAGE_LAST", lambda v: 0 <= v <= 1, "a share of the run, 0 to 1"),
    ("RUN.KEEP_CHECKPOINTS", lambda v: v >= 1, "at least 1"),
    ("RUN.LOG_PERIOD", lambda v: v >= 1, "at least 1"),
    ("RUN.RANK_CHECK_PERIOD", lambda v: v >= 1, "at least 1"),
)


def check_config(cfg: CfgNode) -> None:
    """Check every value that can be checked before the model is built and the data are read.

    Raises:
        NATSError: names the key and what it must be.
    """
    values = _flat(cfg)
    for key, holds, expected in _RULES:
        if not holds(values[key]):
            raise NATSError(f"{key} {values[key]!r}: expected {expected}")
    _check_names(values)


def genotype_set(cfg: CfgNode) -> Any:
    """``MODEL.NATS.SPACE``, or what its None means."""
    return "C" if cfg.MODEL.NATS.SPACE is None else cfg.MODEL.NATS.SPACE


def falls_back_to_cpu(cfg: CfgNode) -> bool:
    """Set ``MODEL.DEVICE`` to the CPU where it is CUDA and PyTorch finds no GPU; whether it did."""
    without = cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available()
    if without:
        cfg.MODEL.DEVICE = "cpu"
    return without


# -- reading --------------------------------------------------------------------------------------


def load_config(path: str, opts=()) -> CfgNode:
    """Detectron2's config with this project's keys, merged from a file and KEY VALUE pairs.

    Args:
        path: a config file, or the name of a Detectron2 zoo config; "" for none.

    Raises:
        NATSError: missing file, not plain YAML, unknown key or wrong type; names the file or key.
    """
    cfg = get_cfg()
    add_nats_config(cfg)
    if path.endswith(".py"):
        raise NATSError(
            f"{path} is a LazyConfig: this command takes YAML. For models of LazyConfigs see "
            "examples/lazyconfig_search.py"
        )
    if os.path.isfile(path):
        _check_bases(path)
        _merge(path, lambda: cfg.merge_from_file(path, allow_unsafe=False))
    elif path:
        # Detectron2's own configs are trusted like its code, and RetinaNet's needs an unsafe tag.
        zoo_path = _zoo_config(path)
        _merge(path, lambda: cfg.merge_from_file(zoo_path, allow_unsafe=True))
    _check_pairs(list(opts))
    for key, value in zip(opts[::2], opts[1::2]):
        if key == "MODEL.NATS.SPACE":
            cfg.MODEL.NATS.SPACE = None  # a list takes the place of a name, and the reverse
        _merge("command line", lambda: cfg.merge_from_list([key, value]))
    return cfg


def _check_pairs(opts: List[str]) -> None:
    """Refuse what cannot be KEY VALUE pairs, with the cure."""
    options = [w for w in opts if isinstance(w, str) and re.fullmatch(r"--[a-z-]{1,40}", w)]
    if options:
        raise NATSError(f"{options[0]} comes after KEY VALUE pairs, which are the last: move it")
    if len(opts) % 2:
        raise NATSError(f"command line: KEY VALUE pairs: {shown(opts[-1])} has no value")
    known = _flat(load_config("")) if opts else {}
    for key, value in zip(opts[::2], opts[1::2]):
        if not isinstance(known.get(key) if isinstance(key, str) else None, (list, tuple)):
            continue
        try:
            given = CfgNode._decode_cfg_value(value)
        except Exception:  # Python's parser raises many kinds; merging says which
            continue
        if isinstance(given, str) or (isinstance(given, (int, float)) and abs(given) < 1e9):
            one = given.strip("()[]{}, '\"") if isinstance(given, str) else given
            example = repr((one,))
            if key == "DATASETS.REGISTER" or len(example) > 60:
                example = "[['my_train', 'train.json', 'images']]"
            raise NATSError(
                f"command line: {key} is a list, with quotes around its names and a comma in a "
                f'list of one: {key} "{example}", not {shown(given)}'
            )


def _check_names(flat: Dict[str, Any]) -> None:
    """Check the names that Detectron2 looks up in its registries; suggests the nearest."""
    backbones = [name for name, _ in BACKBONE_REGISTRY]
    known = {
        "MODEL.META_ARCHITECTURE": [name for name, _ in META_ARCH_REGISTRY],
        "MODEL.BACKBONE.NAME": backbones,
        "MODEL.NATS.BASE_BACKBONE": backbones,
        "MODEL.ROI_HEADS.NAME": [name for name, _ in ROI_HEADS_REGISTRY],
        "SOLVER.LR_SCHEDULER_NAME": _SCHEDULERS,
        **{key: _NORMS for key in flat if key.endswith(".NORM")},
    }
    for key, names in known.items():
        if flat[key] not in names and isinstance(flat[key], str):
            near = difflib.get_close_matches(flat[key], names, 3, 0.5) or filter(None, names)
            raise NATSError(f"{key} {flat[key]!r} is not known: expected {' or '.join(near)}")


def _zoo_config(path: str) -> str:
    folder = os.path.realpath(os.path.join(os.path.dirname(model_zoo.__file__), "configs"))
    found = os.path.realpath(os.path.join(folder, path))
    # A "../" must not lead out of the zoo: the file found is read with unsafe tags
    if not found.startswith(folder + os.sep) or not os.path.isfile(found):
        raise NATSError(
            f"config {path} not found: neither a file nor the name of a config in Detectron2's "
            "zoo, such as COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
        )
    return found


def _check_bases(path: str, depth: int = 0) -> None:
    """Check a config and its bases against our limits, before Detectron2 reads them."""
    if depth > 20:
        raise NATSError(f"{path}: more than 20 levels of _BASE_: is there a cycle?")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise NATSError(f"{path}: not a config: expected KEY: VALUE lines")
    base = content.get("_BASE_")
    if base is None:
        return
    if not isinstance(base, str):
        raise NATSError(f"{path}: _BASE_ must be the path of one config")
    base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
    if os.path.exists(base) and not os.path.isfile(base):
        raise NATSError(f"{path}: _BASE_ {base} is not a file")  # a pipe would block the reader
    _check_bases(base, depth + 1)


def _merge(name: str, merge) -> None:
    try:
        merge()
    except Exception as error:  # Python's parser raises MemoryError for a value like "------…1"
        reason = " ".join(str(error.args[0] if error.args else type(error).__name__).split())[:300]
        unknown = reason.removeprefix("Non-existent key: ")
        if unknown != reason:
            near = difflib.get_close_matches(unknown, _flat(load_config("")), 3, 0.75)
            reason += f", did you mean {' or '.join(near)}?" if near else ""
        raise NATSError(f"{name}: {reason}") from None


# -- for a number of processes --------------------------------------------------------------------


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
    norms = [
        key for key, value in _flat(cfg).items() if key.endswith(".NORM") and value == "SyncBN"
    ]
    cfg.merge_from_list([word for key in norms for word in (key, "naiveSyncBN")])
    return cfg


# -- comparing ------------------------------------------------------------------------------------

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
    old, new = (_flat(CfgNode.load_cfg(dump)) for dump in (saved, cfg.dump()))
    old = {**_flat(load_config("")), **old}  # keys that this version has and the old one had not
    return [
        f"{key}: {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(tuple(free))
    ]


def _flat(node: CfgNode, prefix: str = "") -> Dict[str, Any]:
    flat = {}
    for key, value in node.items():
        is_node = isinstance(value, CfgNode)
        flat.update(_flat(value, f"{prefix}{key}.") if is_node else {prefix + key: value})
    return flat
