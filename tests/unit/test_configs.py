"""Every config of the repository: it loads, safely, and says what the paper says."""

import operator
import re
from pathlib import Path

import pytest
import yaml

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer
from detectron2_nats import NATSError, add_nats_config
from detectron2_nats.config import load_config
from detectron2_nats.config.keys import check_config
from detectron2_nats.engine.machine import with_cpu_sync_bn

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"

# Images of COCO's splits.
TRAIN2014 = 82783
TRAIN2017 = 118287

CONVS = ["res3.*", "res4.*", "res5.*"]
SEARCHED = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.BACKBONE.NAME": "build_nats_backbone",
    "MODEL.NATS.BASE_BACKBONE": "build_resnet_fpn_backbone",
    "MODEL.NATS.CONVS": CONVS,
    "MODEL.NATS.ARCHITECTURE": [],
    # 8 GPUs with one image each, 25 epochs, α frozen for 10 of them.
    "SOLVER.REFERENCE_WORLD_SIZE": 8,
    "SOLVER.IMS_PER_BATCH": 8,
    "SOLVER.MAX_ITER": round(25 * TRAIN2014 / 8),
    "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.BASE_LR_END": 0.0004,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.WEIGHT_DECAY": 1e-4,
    "SEARCH.ALPHA_START": 0.4,
    "SEARCH.ALPHA_LR": 0.01,
    "SEARCH.ALPHA_WEIGHT_DECAY": 1e-5,
    "SEARCH.ALPHA_IMS_PER_BATCH": 0,
    "SEARCH.DECODE_ORDER": "paper",
    "DATASETS.TRAIN": ("coco_2014_train",),
    "DATASETS.CALIBRATION": ("coco_2014_valminusminival",),
    "INPUT.MIN_SIZE_TRAIN": (800,),
    "INPUT.MAX_SIZE_TRAIN": 1200,
    "INPUT.MIN_SIZE_TEST": 800,
}
RETRAINED = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.NATS.ARCHITECTURE": [],
    # 8 GPUs with two images each, 13 epochs, a tenth of the rate after 8 and 11.
    "SOLVER.REFERENCE_WORLD_SIZE": 8,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.MAX_ITER": round(13 * TRAIN2017 / 16),
    "SOLVER.STEPS": tuple(round(epochs * TRAIN2017 / 16) for epochs in (8, 11)),
    "SOLVER.GAMMA": 0.1,
    "SOLVER.BASE_LR": 0.02,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.WEIGHT_DECAY": 1e-4,
    "SOLVER.WEIGHT_DECAY_NORM": 0,  # Detectron2's; docs/method.md says so
    "DATASETS.TRAIN": ("coco_2017_train",),
    "DATASETS.TEST": ("coco_2017_val",),
}


def groups(depth, space, num_groups=16, channels=0):
    keys = ("RESNETS.DEPTH", "NATS.SPACE", "NATS.NUM_GROUPS", "NATS.CHANNELS_PER_GROUP")
    values = (depth, space, num_groups, channels)
    return {**SEARCHED, **{f"MODEL.{key}": value for key, value in zip(keys, values)}}


def of_depth(depth, **more):
    return {**RETRAINED, "MODEL.RESNETS.DEPTH": depth, **more}


LARGE_BATCH = {
    "SOLVER.IMS_PER_BATCH": 64,
    "SOLVER.MAX_ITER": round(25 * TRAIN2014 / 64),
    "SOLVER.BASE_LR": 0.08,
    "SOLVER.BASE_LR_END": 0.0032,
    "SOLVER.AMP.ENABLED": True,
}
ROWS = {
    "search/faster_rcnn_R_50_FPN": groups(50, "C"),
    "search/faster_rcnn_R_50_FPN_set_A": groups(50, "A"),
    "search/faster_rcnn_R_50_FPN_set_B": groups(50, "B"),
    "search/faster_rcnn_R_50_FPN_1group": groups(50, "C", 1),
    "search/faster_rcnn_R_50_FPN_bs64": {**groups(50, "C"), **LARGE_BATCH},
    "search/faster_rcnn_R_101_FPN": groups(101, "C", channels=32),
    "search/faster_rcnn_X_101_32x4d_FPN": groups(101, "C", channels=32),
    "retrain/faster_rcnn_R_50_FPN": of_depth(50),
    "retrain/mask_rcnn_R_50_FPN": of_depth(50, **{"MODEL.MASK_ON": True}),
    "retrain/cascade_rcnn_R_50_FPN": of_depth(50, **{"MODEL.ROI_HEADS.NAME": "CascadeROIHeads"}),
    # its rate is half of it, as in Detectron2's zoo
    "retrain/retinanet_R_50_FPN": of_depth(
        50, **{"MODEL.META_ARCHITECTURE": "RetinaNet", "SOLVER.BASE_LR": 0.01}
    ),
    "retrain/faster_rcnn_R_101_FPN": of_depth(101),
    "retrain/faster_rcnn_X_101_32x4d_FPN": of_depth(101),
}


def config_files(*folders):
    return sorted(path for folder in folders for path in (CONFIGS / folder).glob("*.yaml"))


def load(path, nats=True):
    """The config as a script gets it, read with a safe YAML loader."""
    cfg = get_cfg()
    if nats:
        add_nats_config(cfg)
    cfg.merge_from_other_cfg(CfgNode(CfgNode.load_yaml_with_base(str(path), allow_unsafe=False)))
    return cfg


@pytest.mark.parametrize("folder", ["search", "retrain", "quickstart", "examples"])
def test_each_config_loads_and_names_its_version(folder):
    for path in config_files(folder):
        # Without it, Detectron2 guesses an old version and rewrites the keys.
        assert CfgNode.load_yaml_with_base(str(path), allow_unsafe=False)["VERSION"] == 2
        assert path.read_text().startswith("# ")  # which row of the paper this is
        cfg = load_config(str(path))
        check_config(cfg)
        # A dumped config is read again by the exporter and by evaluation.
        assert yaml.safe_load(cfg.dump())["SOLVER"]["MAX_ITER"] == cfg.SOLVER.MAX_ITER


def test_every_row_of_the_paper_has_a_config():
    paths = config_files("search", "retrain")
    names = {f"{path.parent.name}/{path.stem}" for path in paths if path.stem[:5] != "Base-"}
    assert names == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_config_says_what_the_paper_says(name):
    cfg = load(CONFIGS / f"{name}.yaml")
    for key, expected in ROWS[name].items():
        value = operator.attrgetter(key)(cfg)
        value = tuple(value) if isinstance(expected, tuple) else value
        assert value == (pytest.approx(expected) if isinstance(expected, float) else expected), key


@pytest.mark.parametrize("path", config_files("retrain"), ids=lambda path: path.stem)
def test_a_retraining_is_a_plain_detectors_and_scales_with_the_processes(path):
    cfg = load(path, nats=False)  # no key of this project
    four = DefaultTrainer.auto_scale_workers(cfg, 4).SOLVER
    assert (four.IMS_PER_BATCH, four.MAX_ITER) == (8, 2 * cfg.SOLVER.MAX_ITER)
    assert four.BASE_LR == cfg.SOLVER.BASE_LR / 2
    assert with_cpu_sync_bn(cfg, 8) is cfg
    cfg.MODEL.DEVICE = "cpu"
    assert with_cpu_sync_bn(cfg, 1) is cfg
    assert re.findall("(naive)?SyncBN", with_cpu_sync_bn(cfg, 2).dump()) == ["naive"]
    assert cfg.MODEL.RESNETS.NORM == "SyncBN"


def test_retinanet_anchors():
    cfg = load(CONFIGS / "retrain" / "retinanet_R_50_FPN.yaml")
    expected = [[x * 2 ** (i / 3) for i in range(3)] for x in (32, 64, 128, 256, 512)]
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [pytest.approx(sizes) for sizes in expected]


@pytest.mark.parametrize("path", config_files("search", "examples"))
def test_search_and_retraining_are_of_one_network(path):
    cfg = load(path)
    if not cfg.SEARCH.RETRAIN_CONFIG:
        others = ("Base-Search-RCNN-FPN", "own_data_retrain")
        assert path.stem in others or path.stem.startswith("own_data_small")
        return
    retrain = load(ROOT / cfg.SEARCH.RETRAIN_CONFIG, nats=False)
    assert retrain.MODEL.WEIGHTS == cfg.MODEL.WEIGHTS
    assert retrain.MODEL.PIXEL_MEAN == cfg.MODEL.PIXEL_MEAN
    assert retrain.MODEL.PIXEL_STD == cfg.MODEL.PIXEL_STD
    assert retrain.INPUT == cfg.INPUT
    assert retrain.MODEL.BACKBONE.NAME == cfg.MODEL.NATS.BASE_BACKBONE
    norms = retrain.MODEL.RESNETS.pop("NORM"), cfg.MODEL.RESNETS.pop("NORM")
    assert norms in (("SyncBN", "FrozenBN"), ("FrozenBN", "FrozenBN"))
    assert retrain.MODEL.RESNETS == cfg.MODEL.RESNETS


def test_small_detector_for_own_data():
    """One run searches and trains."""
    plain = load(CONFIGS / "examples" / "own_data_small.yaml")
    search = load(CONFIGS / "examples" / "own_data_small_search.yaml")
    alpha_steps = (1 - search.SEARCH.ALPHA_START) * search.SEARCH.FREEZE_AT * plain.SOLVER.MAX_ITER
    assert alpha_steps * search.SEARCH.ALPHA_LR == pytest.approx(11.2)
    assert search.SEARCH.RETRAIN_WEIGHTS == "supernet" and search.MODEL.NATS.SAMPLE
    assert search.SOLVER == plain.SOLVER and search.INPUT == plain.INPUT
    assert plain.DATASETS.TRAIN == plain.DATASETS.TEST == ()
    assert len(search.DATASETS.CALIBRATION) == 0


def test_own_data():
    """The search is short, the retraining long and from its weights; no split is COCO's."""
    plain = load(CONFIGS / "examples" / "own_data_retrain.yaml", nats=False)
    search = load(CONFIGS / "examples" / "own_data.yaml")
    assert plain.SOLVER.MAX_ITER == 700 and search.SOLVER.MAX_ITER == 300
    assert search.SEARCH.RETRAIN_WEIGHTS == "supernet" and search.MODEL.NATS.SAMPLE
    assert search.SEARCH.ALPHA_START == pytest.approx(0.33)
    assert search.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR"
    assert plain.DATASETS.TRAIN == plain.DATASETS.TEST == ()
    assert len(search.DATASETS.CALIBRATION) == len(search.DATASETS.REGISTER) == 0


@pytest.mark.parametrize(
    "opts, message",
    [
        (["SEED", "1", "--resume"], "--resume comes after KEY VALUE pairs.* move it"),
        (["SEED", "1", "--num-gpus", "2"], "--num-gpus comes after KEY VALUE pairs"),
        (["SEED"], "KEY VALUE pairs: 'SEED' has no value"),
        (["DATASETS.TRAIN", "('mine')"], "DATASETS.TRAIN: a list has quotes .* and a comma"),
        (["DATASETS.TRAIN", "(mine,)"], "DATASETS.TRAIN: a list has quotes"),
        (["SOLVER.STEPS", "100"], "SOLVER.STEPS: a list has"),
        (["DATASETS.REGISTER", "[[a, b, c]]"], "DATASETS.REGISTER: a list has quotes"),
        (["MODEL.NATS.NUM_GROUP", "4"], "did you mean MODEL.NATS.NUM_GROUPS"),
    ],
)
def test_key_value_pairs_that_cannot_be(opts, message):
    with pytest.raises(NATSError, match=message):
        load_config("", opts)


def test_a_set_of_genotypes_and_a_list_replace_each_other():
    path = str(CONFIGS / "quickstart/search.yaml")
    assert load_config(path, ["MODEL.NATS.SPACE", "A"]).MODEL.NATS.SPACE == "A"
    assert load_config(path, ["MODEL.NATS.SPACE", "None"]).MODEL.NATS.SPACE is None
    given = ["MODEL.NATS.SPACE", "A", "MODEL.NATS.SPACE", "[[[1, 1], [3, 3]]]"]
    assert load_config("", given).MODEL.NATS.SPACE == [[[1, 1], [3, 3]]]


def test_a_lazy_config_is_refused():
    with pytest.raises(NATSError, match="retinanet_R_50_FPN_1x.py is a LazyConfig"):
        load_config("COCO-Detection/retinanet_R_50_FPN_1x.py")


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("MODEL.META_ARCHITECTURE", "RetinNet", "RetinaNet"),
        ("MODEL.BACKBONE.NAME", "build_resnet_fpn", "build_resnet_fpn_backbone"),
        ("MODEL.NATS.BASE_BACKBONE", "resnet_fpn_backbone", "build_resnet_fpn_backbone"),
        ("MODEL.RESNETS.NORM", "BatchNorm", "BN or SyncBN"),
        ("SOLVER.LR_SCHEDULER_NAME", "CosineLR", "WarmupCosineLR"),
    ],
)
def test_names_that_detectron2_does_not_know(key, value, expected):
    with pytest.raises(NATSError, match=f"{key} '{value}' is not known: expected .*{expected}"):
        check_config(load_config("", [key, value]))


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("TEST.AUG.ENABLED", True, "False: evaluate without, or by Detectron2's own tools"),
        ("SEARCH.ALPHA_START", 1.0, "a share of the search, below 1"),
        ("SEARCH.RETRAIN_WEIGHTS", "coco", "base or supernet"),
        ("SOLVER.AMP.PRECISION", "float8", "float16 or bfloat16"),
        ("SOLVER.AVERAGE_LAST", 1.5, "a share of the run, 0 to 1"),
        ("RUN.KEEP_CHECKPOINTS", 0, "at least 1"),
    ],
)
def test_values_that_are_checked_before_anything_is_built(key, value, expected):
    check_config(load_config(""))
    with pytest.raises(NATSError) as caught:
        check_config(load_config("", [key, value]))
    assert str(caught.value) == f"{key} {value!r}: expected {expected}"


def test_a_config_with_a_key_of_before_loads():
    assert "MAX_BAD_STEPS" not in load_config("", ["RUN.MAX_BAD_STEPS", "3"]).RUN
