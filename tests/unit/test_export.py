"""A searched ResNet-50 goes into every kind of detector of Detectron2's zoo."""

import pytest
import torch
from calls import call

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2_nats import Architecture, NATSError
from detectron2_nats.config import load_config
from detectron2_nats.engine.loader import dataset_dicts
from detectron2_nats.files import read_yaml
from detectron2_nats.method.layers import GroupedDilationConv2d
from detectron2_nats.search.export import export_config, write_config

BLOCKS = {"res3": (4, 128), "res4": (6, 256), "res5": (3, 512)}

SEARCHED = Architecture(
    {
        f"{stage}.{block}.conv2": [[channels // 2, 1, 1], [channels // 2, 1, 3]]
        for stage, (blocks, channels) in BLOCKS.items()
        for block in range(blocks)
    }
)


@pytest.mark.parametrize(
    "name, convs",
    [
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x", 13),
        ("COCO-Detection/faster_rcnn_R_50_C4_1x", 10),  # res5 is in its heads, and stays plain
        ("COCO-Detection/retinanet_R_50_FPN_1x", 13),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x", 13),
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x", 13),
    ],
)
def test_exports_to_every_zoo_detector(tmp_path, name, convs):
    path = str(tmp_path / "retrain.yaml")
    write_config(export_config(load_config(f"{name}.yaml"), SEARCHED), path)
    cfg = load_config(path)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    found = [m for m in model.modules() if isinstance(m, GroupedDilationConv2d)]
    assert len(found) == convs
    plain = load_config(f"{name}.yaml")
    plain.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        expected = build_model(plain).state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in expected.items()
    }


def test_an_architecture_of_another_width_is_refused():
    with pytest.raises(NATSError, match="does not fit res3.0.conv2.*128 channels.*"):
        cfg = load_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
        cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 32
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 128
        export_config(cfg, SEARCHED)


def test_missing_proposals_are_named():
    cfg = load_config("")
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = ("nowhere.pkl",)
    with pytest.raises(NATSError, match="nats_registers_val: .*nowhere.pkl"):
        dataset_dicts(cfg, ["nats_registers_val"])


def test_keys_of_other_projects_are_kept(tmp_path):
    """PointRend and the like add nodes that this project's defaults know nothing of."""
    cfg = load_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.POINT_HEAD = CfgNode({"NAME": "StandardPointHead", "IN_FEATURES": ("p2",)})
    path = tmp_path / "retrain.yaml"
    write_config(export_config(cfg, SEARCHED), str(path))
    head = read_yaml(str(path))["MODEL"]["POINT_HEAD"]
    assert head == {"NAME": "StandardPointHead", "IN_FEATURES": ["p2"]}


def test_a_config_is_not_written_over_itself(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("# mine\nMODEL: {META_ARCHITECTURE: RetinaNet}\n")
    words = ["--config-file", config, "--output", f"{tmp_path}/../{tmp_path.name}/mine.yaml"]
    architecture = tmp_path / "architecture.yaml"
    Architecture({"res4.0.conv2": [[256, 1, 2]]}).save(str(architecture))
    call("nats-export", architecture, *words, status=2)
    assert config.read_text().startswith("# mine")
