"""Every config key of the project: its default and its meaning."""

from detectron2.config import CfgNode as CN

__all__ = ["add_nats_config", "DEFAULT_NUM_GROUPS"]

DEFAULT_NUM_GROUPS = 16


def add_nats_config(cfg: CN) -> None:
    """Add the project's keys to a Detectron2 config, in place."""
    # -- the backbone: MODEL.BACKBONE.NAME "build_nats_backbone" makes these count --------------
    cfg.MODEL.NATS = CN()
    # Any registered builder whose residual stages are made of Detectron2's blocks.
    cfg.MODEL.NATS.BASE_BACKBONE = "build_resnet_fpn_backbone"
    # List of [layer name, [[output channels, d_h, d_w], ...]]. Non-empty: build this frozen
    # network. Empty: build the super-network. tools/export.py writes it.
    cfg.MODEL.NATS.ARCHITECTURE = []
    # Searched stages.
    cfg.MODEL.NATS.STAGES = ["res3", "res4", "res5"]
    # The paper's genotype set "A", "B" or "C", or a list of dilation pairs per stage, such as
    # [[[1, 1], [3, 3]], [[1, 1], [3, 3]], [[1, 1], [5, 5]]]. None means "C": with a string as the
    # default, a list would be refused as a value of another type.
    cfg.MODEL.NATS.SPACE = None
    # Channel groups per conv, each with its own choice; 1 is path-level search.
    cfg.MODEL.NATS.NUM_GROUPS = DEFAULT_NUM_GROUPS
    # When > 0 it rules: groups of so many output channels. (Not beside another NUM_GROUPS.)
    cfg.MODEL.NATS.CHANNELS_PER_GROUP = 0
    # One weight under all dilations instead of one replica per genotype.
    cfg.MODEL.NATS.SHARE_WEIGHTS = False

    # -- data -----------------------------------------------------------------------------------
    # The split that α is trained on; it must share no image with DATASETS.TRAIN.
    cfg.DATASETS.CALIBRATION = ["coco_2014_valminusminival"]
    # Own COCO-format data: [[name, annotation json, image folder], ...].
    cfg.DATASETS.REGISTER = []
    # Detectron2's RandomSubsetTrainingSampler reads it, its defaults have no such key.
    if "RANDOM_SUBSET_RATIO" not in cfg.DATALOADER:
        cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.0

    # -- the search -----------------------------------------------------------------------------
    cfg.SEARCH = CN()
    # Adam for α, constant rate (section 4.2).
    cfg.SEARCH.ALPHA_LR = 0.01
    cfg.SEARCH.ALPHA_WEIGHT_DECAY = 1e-5
    # Fraction of the run after which α steps begin: 10 of 25 epochs.
    cfg.SEARCH.ALPHA_START = 0.4
    # Images of an α step on all GPUs together; 0: as many as SOLVER.IMS_PER_BATCH.
    cfg.SEARCH.ALPHA_IMS_PER_BATCH = 0
    # "paper": channels sorted by dilation; "voted": each group keeps its own rows.
    cfg.SEARCH.DECODE_ORDER = "paper"
    # A group leaves (1, 1) only where its best share of softmax(α) leads (1, 1)'s by more than
    # this. 0: the paper's argmax.
    cfg.SEARCH.DECODE_MARGIN = 0.0
    # Detector config (a path, or the name of a Detectron2 zoo config) for which the search writes
    # its plain config at the end. Empty: the searched detector itself with the search's schedule.
    cfg.SEARCH.RETRAIN_CONFIG = ""
    # What retraining starts from. "base": RETRAIN_CONFIG's MODEL.WEIGHTS, as in the paper.
    # "supernet": the super-network's own weights, which the search writes to frozen.pth; the
    # order is then "voted", the only one that they fit.
    cfg.SEARCH.RETRAIN_WEIGHTS = "base"

    # -- how a run behaves, for searches and retraining alike -------------------------------------
    # Precision of SOLVER.AMP: "float16" (with loss scaling) or "bfloat16".
    cfg.SOLVER.AMP.PRECISION = "float16"
    # Share of the run, at its end, over which the weights are averaged; their mean is what is then
    # evaluated and written to model_final.pth. 0: the last iteration's weights, as Detectron2 does.
    cfg.SOLVER.AVERAGE_LAST = 0.0
    cfg.RUN = CN()
    # How many checkpoints are kept; older ones are deleted.
    cfg.RUN.KEEP_CHECKPOINTS = 3
    # Iterations between two lines of the log.
    cfg.RUN.LOG_PERIOD = 20
    # Non-finite losses or gradients in a row after which the run stops.
    cfg.RUN.MAX_BAD_STEPS = 10
    # Share of a data set's images, or annotations, that may be unusable before the run stops.
    cfg.RUN.MAX_BAD_DATA = 0.01
    # Iterations between two checks that all ranks hold the same α.
    cfg.RUN.RANK_CHECK_PERIOD = 100
