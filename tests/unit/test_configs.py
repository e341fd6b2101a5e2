"""Every config of the repository: it loads, safely, and says what the paper says."""

import re
from pathlib import Path

import pytest
import yaml

from detectron2.config import CfgNode, get_cfg
from detectron2.data.datasets.builtin import _PREDEFINED_SPLITS_COCO
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
LR_PER_IMAGE = 0.00125
LR_PER_IMAGE_END = 0.00005

SEARCH = {
    "faster_rcnn_R_50_FPN": {"depth": 50, "space": "C", "groups": 16},
    "faster_rcnn_R_50_FPN_set_A": {"depth": 50, "space": "A", "groups": 16},
    "faster_rcnn_R_50_FPN_set_B": {"depth": 50, "space": "B", "groups": 16},
    "faster_rcnn_R_50_FPN_1group": {"depth": 50, "space": "C", "groups": 1},
    "faster_rcnn_R_101_FPN": {"depth": 101, "space": "C", "channels": 32},
    "faster_rcnn_X_101_32x4d_FPN": {"depth": 101, "space": "C", "channels": 32},
}
RETRAIN = {
    "faster_rcnn_R_50_FPN": {"depth": 50, "meta": "GeneralizedRCNN"},
    "mask_rcnn_R_50_FPN": {"depth": 50, "meta": "GeneralizedRCNN"},
    "cascade_rcnn_R_50_FPN": {"depth": 50, "meta": "GeneralizedRCNN"},
    "retinanet_R_50_FPN": {"depth": 50, "meta": "RetinaNet"},
    "faster_rcnn_R_101_FPN": {"depth": 101, "meta": "GeneralizedRCNN"},
    "faster_rcnn_X_101_32x4d_FPN": {"depth": 101, "meta": "GeneralizedRCNN"},
}


def config_files(*folders):
    return sorted(path for folder in folders for path in (CONFIGS / folder).glob("*.yaml"))


def by_name(path):
    return path.relative_to(CONFIGS).as_posix()


def load(path, nats=True):
    """The config as a script gets it, read with a safe YAML loader."""
    cfg = get_cfg()
    if nats:
        add_nats_config(cfg)
    cfg.merge_from_other_cfg(CfgNode(CfgNode.load_yaml_with_base(str(path), allow_unsafe=False)))
    return cfg


def rounded(value):
    return int(value + 0.5)


def runnable(folder):
    return {path.stem for path in config_files(folder) if not path.stem.startswith("Base-")}


@pytest.mark.parametrize(
    "path", config_files("search", "retrain", "examples", "study"), ids=by_name
)
def test_loads_and_names_its_version(path):
    cfg = load(path)
    assert cfg.VERSION == 2
    # Without it, Detectron2 guesses an old version and rewrites the keys.
    assert CfgNode.load_yaml_with_base(str(path), allow_unsafe=False)["VERSION"] == 2
    # The comment that says which row of the paper this is.
    assert path.read_text().startswith("# ")
    known = {*_PREDEFINED_SPLITS_COCO["coco"], *(name for name, *_ in cfg.DATASETS.REGISTER)}
    assert set(cfg.DATASETS.TRAIN + cfg.DATASETS.TEST) <= known
    # A dumped config is read again by the exporter and by evaluation.
    assert yaml.safe_load(cfg.dump())["SOLVER"]["MAX_ITER"] == cfg.SOLVER.MAX_ITER


def test_every_row_of_the_paper_has_a_config():
    assert runnable("search") == {*SEARCH, "faster_rcnn_R_50_FPN_bs64"}
    assert runnable("retrain") == set(RETRAIN)


def test_eight_images_per_gpu_are_the_same_search_with_the_rate_that_follows():
    usual, large = (
        load(CONFIGS / "search" / f"faster_rcnn_R_50_FPN{suffix}.yaml") for suffix in ("", "_bs64")
    )
    assert large.SOLVER.AMP.ENABLED and large.SOLVER.IMS_PER_BATCH == 64
    assert large.SOLVER.MAX_ITER == rounded(25 * TRAIN2014 / 64)
    assert large.SOLVER.BASE_LR == pytest.approx(LR_PER_IMAGE * 64)
    assert large.SOLVER.BASE_LR_END == pytest.approx(LR_PER_IMAGE_END * 64)
    large.SOLVER = usual.SOLVER
    assert large == usual


@pytest.mark.parametrize("name", SEARCH)
def test_search(name):
    row = SEARCH[name]
    cfg = load(CONFIGS / "search" / f"{name}.yaml")

    assert cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    assert cfg.MODEL.BACKBONE.NAME == "build_nats_backbone"
    assert cfg.MODEL.NATS.BASE_BACKBONE == "build_resnet_fpn_backbone"
    assert cfg.MODEL.NATS.CONVS == ["res3.*", "res4.*", "res5.*"]
    assert cfg.MODEL.NATS.ARCHITECTURE == []
    assert cfg.MODEL.RESNETS.DEPTH == row["depth"]
    assert cfg.MODEL.NATS.SPACE == row["space"]
    if "groups" in row:
        assert cfg.MODEL.NATS.NUM_GROUPS == row["groups"]
        assert cfg.MODEL.NATS.CHANNELS_PER_GROUP == 0
    else:
        assert cfg.MODEL.NATS.CHANNELS_PER_GROUP == row["channels"]

    # 8 GPUs with one image each, 25 epochs, α frozen for 10 of them.
    solver = cfg.SOLVER
    assert (solver.REFERENCE_WORLD_SIZE, solver.IMS_PER_BATCH) == (8, 8)
    assert solver.MAX_ITER == rounded(25 * TRAIN2014 / solver.IMS_PER_BATCH)
    assert cfg.SEARCH.ALPHA_START == pytest.approx(10 / 25)
    assert solver.LR_SCHEDULER_NAME == "WarmupCosineLR"
    assert solver.BASE_LR == pytest.approx(LR_PER_IMAGE * solver.IMS_PER_BATCH)
    assert solver.BASE_LR_END == pytest.approx(LR_PER_IMAGE_END * solver.IMS_PER_BATCH)
    assert (solver.MOMENTUM, solver.WEIGHT_DECAY) == (0.9, 1e-4)
    assert (cfg.SEARCH.ALPHA_LR, cfg.SEARCH.ALPHA_WEIGHT_DECAY) == (0.01, 1e-5)
    assert cfg.SEARCH.ALPHA_IMS_PER_BATCH == 0
    assert cfg.SEARCH.DECODE_ORDER == "paper"

    assert cfg.DATASETS.TRAIN == ("coco_2014_train",)
    assert tuple(cfg.DATASETS.CALIBRATION) == ("coco_2014_valminusminival",)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (800,)
    assert (cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST) == (1200, 800)


@pytest.mark.parametrize("name", RETRAIN)
def test_retraining_by_cpu_processes_takes_norms_that_work_there(name):
    cfg = load(CONFIGS / "retrain" / f"{name}.yaml", nats=False)
    assert with_cpu_sync_bn(cfg, 8) is cfg
    cfg.MODEL.DEVICE = "cpu"
    assert with_cpu_sync_bn(cfg, 1) is cfg
    assert re.findall("(naive)?SyncBN", with_cpu_sync_bn(cfg, 2).dump()) == ["naive"]
    assert cfg.MODEL.RESNETS.NORM == "SyncBN"


@pytest.mark.parametrize("name", RETRAIN)
def test_retrain(name):
    row = RETRAIN[name]
    path = CONFIGS / "retrain" / f"{name}.yaml"
    cfg = load(path, nats=False)  # a plain detector: no key of this project

    assert cfg.MODEL.META_ARCHITECTURE == row["meta"]
    assert cfg.MODEL.RESNETS.DEPTH == row["depth"]
    assert cfg.MODEL.RESNETS.NORM == "SyncBN"
    assert cfg.MODEL.MASK_ON == name.startswith("mask")
    assert (cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads") == name.startswith("cascade")

    solver = cfg.SOLVER
    # 8 GPUs with two images each; with others Detectron2 scales batch, rate and schedule.
    assert (solver.REFERENCE_WORLD_SIZE, solver.IMS_PER_BATCH) == (8, 16)
    assert DefaultTrainer.auto_scale_workers(cfg, 8) is cfg
    four = DefaultTrainer.auto_scale_workers(cfg, 4).SOLVER
    assert (four.IMS_PER_BATCH, four.MAX_ITER) == (8, 2 * solver.MAX_ITER)
    assert four.BASE_LR == solver.BASE_LR / 2
    assert solver.MAX_ITER == rounded(13 * TRAIN2017 / solver.IMS_PER_BATCH)
    assert solver.STEPS == tuple(rounded(e * TRAIN2017 / solver.IMS_PER_BATCH) for e in (8, 11))
    assert solver.GAMMA == 0.1
    # RetinaNet's rate is half of it, as in Detectron2's zoo.
    share = 0.5 if name.startswith("retinanet") else 1
    assert solver.BASE_LR == pytest.approx(share * LR_PER_IMAGE * solver.IMS_PER_BATCH)
    assert (solver.MOMENTUM, solver.WEIGHT_DECAY) == (0.9, 1e-4)
    assert solver.WEIGHT_DECAY_NORM == 0  # Detectron2's; docs/method.md says so
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",)
    assert cfg.DATASETS.TEST == ("coco_2017_val",)

    # Knowing this project's keys changes nothing else.
    known = load(path)
    for key in ("MODEL", "DATASETS", "SOLVER"):
        for subkey, value in cfg[key].items():
            if subkey != "AMP":  # holds a key of this project
                assert known[key][subkey] == value
    assert known.MODEL.NATS.ARCHITECTURE == []


def test_retinanet_anchors():
    cfg = load(CONFIGS / "retrain" / "retinanet_R_50_FPN.yaml")
    expected = [[x * 2 ** (i / 3) for i in range(3)] for x in (32, 64, 128, 256, 512)]
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [pytest.approx(sizes) for sizes in expected]


@pytest.mark.parametrize("path", config_files("search", "examples"), ids=by_name)
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
    plain = load(CONFIGS / "examples" / "own_data_retrain.yaml", nats=False)
    search = load(CONFIGS / "examples" / "own_data.yaml")
    # The search is short, the retraining long and from its weights.
    assert plain.SOLVER.MAX_ITER == 700 and search.SOLVER.MAX_ITER == 300
    assert search.SEARCH.RETRAIN_WEIGHTS == "supernet" and search.MODEL.NATS.SAMPLE
    assert search.SEARCH.ALPHA_START == pytest.approx(0.33)
    assert search.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR"
    assert search.DATASETS.REGISTER == []
    # Nothing of COCO is taken where a split was forgotten.
    assert plain.DATASETS.TRAIN == plain.DATASETS.TEST == ()
    assert len(search.DATASETS.CALIBRATION) == 0

    # As given on the command line.
    search.merge_from_list(
        [
            "DATASETS.REGISTER",
            "[['my_train', 'train.json', 'images'], ['my_calib', 'calib.json', 'images']]",
            "DATASETS.TRAIN",
            "('my_train',)",
            "DATASETS.CALIBRATION",
            "('my_calib',)",
        ]
    )
    assert search.DATASETS.REGISTER[1] == ["my_calib", "calib.json", "images"]
    assert search.DATASETS.TRAIN == ("my_train",)
    assert list(search.DATASETS.CALIBRATION) == ["my_calib"]


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
        ("MODEL.ROI_HEADS.NAME", "StandardROIHead", "StandardROIHeads"),
        ("MODEL.RESNETS.NORM", "BatchNorm", "BN or SyncBN"),
        ("MODEL.FPN.NORM", "FrozenBatchNorm", "FrozenBN"),
        ("SOLVER.LR_SCHEDULER_NAME", "CosineLR", "WarmupCosineLR"),
    ],
)
def test_names_that_detectron2_does_not_know(key, value, expected):
    with pytest.raises(NATSError, match=f"{key} '{value}' is not known: expected .*{expected}"):
        check_config(load_config("", [key, value]))


@pytest.mark.parametrize(
    "path", config_files("search", "retrain", "quickstart", "examples", "study")
)
def test_the_repositorys_names_are_known(path):
    check_config(load_config(str(path)))


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("SEARCH.ALPHA_START", 1.0, "a share of the search, below 1"),
        ("SEARCH.RETRAIN_WEIGHTS", "coco", "base or supernet"),
        ("SOLVER.AMP.PRECISION", "float8", "float16 or bfloat16"),
        ("SOLVER.AVERAGE_LAST", 1.5, "a share of the run, 0 to 1"),
        ("RUN.KEEP_CHECKPOINTS", 0, "at least 1"),
        ("RUN.LOG_PERIOD", 0, "at least 1"),
        ("RUN.RANK_CHECK_PERIOD", -1, "at least 1"),
    ],
)
def test_values_that_are_checked_before_anything_is_built(key, value, expected):
    check_config(load_config(""))
    with pytest.raises(NATSError) as caught:
        check_config(load_config("", [key, value]))
    assert str(caught.value) == f"{key} {value!r}: expected {expected}"


def test_a_config_with_a_key_of_before_loads():
    assert "MAX_BAD_STEPS" not in load_config("", ["RUN.MAX_BAD_STEPS", "3"]).RUN
