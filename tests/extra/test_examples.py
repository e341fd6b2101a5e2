"""The examples, with tiny detectors."""

import argparse
import importlib.util
import os
import re

import pytest
import torch
from runs import REPOSITORY, TINY

from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from detectron2_nats import Architecture, GroupedDilationConv2d
from detectron2_nats.config import load_config
from detectron2_nats.method.names import searchable
from detectron2_nats.search.export import export_config, write_config

NARROW = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.STEM_OUT_CHANNELS", 8]
NARROW += ["MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16]
NARROW += ["MODEL.FPN.OUT_CHANNELS", 16, "MODEL.RPN.POST_NMS_TOPK_TEST", 20]
NARROW += ["MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_MASK_HEAD.FC_DIM", 16]
NARROW += ["MODEL.ROI_MASK_HEAD.CONV_DIM", 16]
NARROW += ["MODEL.POINT_HEAD.FC_DIM", 16, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50]


def example(name: str):
    """An example as a module."""
    path = REPOSITORY / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mixed_architecture(width: int, stages=("res3", "res4", "res5")) -> Architecture:
    """Three dilations in each conv of a ResNet-50 whose res2 has `width` channels."""
    layers = {}
    for stage, blocks in zip(("res2", "res3", "res4", "res5"), (3, 4, 6, 3)):
        quarter = width * 2 ** (int(stage[3]) - 2) // 4
        runs = [[2 * quarter, 1, 1], [quarter, 1, 3], [quarter, 2, 2]]
        if stage in stages:
            layers.update({f"{stage}.{block}.conv2": runs for block in range(blocks)})
    return Architecture(layers)


def count_grouped(model) -> int:
    return sum(
        hasattr(c, "segments") or hasattr(c, "plain_dilation")
        for c in searchable(model, ["res*"]).values()
    )


def test_pointrend(tmp_path):
    pytest.importorskip("cv2")  # PointRend's own need
    module = example("pointrend_searched")
    path, output = str(tmp_path / "architecture.yaml"), str(tmp_path / "pointrend.yaml")
    mixed_architecture(8).save(path)
    opts = [str(value) for value in NARROW]
    module.main(argparse.Namespace(architecture=path, output=output, opts=opts))

    # the written config alone makes the model, in a process that knows both projects
    cfg = module.get_cfg()
    module.add_pointrend_config(cfg)
    module.add_nats_config(cfg)
    cfg.merge_from_file(output, allow_unsafe=False)
    torch.manual_seed(0)
    model = build_model(cfg)
    assert type(model.roi_heads.mask_head).__name__ == "PointRendMaskHead"
    assert count_grouped(model.backbone) == 13
    plain = cfg.clone()
    plain.MODEL.BACKBONE.NAME = plain.MODEL.NATS.BASE_BACKBONE
    expected = {k: v.shape for k, v in build_model(plain).state_dict().items()}
    assert {k: v.shape for k, v in model.state_dict().items()} == expected

    # it trains: every trained conv of the searched stages gets a gradient
    image = torch.randint(0, 256, (3, 96, 128))
    target = Instances((96, 128))
    target.gt_boxes = Boxes([[10.0, 20.0, 90.0, 80.0]])
    target.gt_classes = torch.tensor([3])
    masks = torch.zeros(1, 96, 128, dtype=torch.bool)
    masks[:, 25:75, 15:85] = True
    target.gt_masks = BitMasks(masks)
    with EventStorage():
        losses = model([{"image": image, "instances": target}])
    assert "loss_mask_point" in losses
    sum(losses.values()).backward()
    convs = [c for n, c in searchable(model.backbone, ["res*"]).items() if not n.startswith("res2")]
    assert all(conv.weight.grad is not None for conv in convs)
    # and it detects
    with torch.no_grad():
        instances = model.eval()([{"image": image}])[0]["instances"]
    assert instances.pred_masks.shape[1:] == (96, 128)


def test_lazyconfig(tmp_path):
    module = example("lazyconfig_searched")
    path, output = str(tmp_path / "architecture.yaml"), str(tmp_path / "lazy.yaml")
    architecture = mixed_architecture(64)
    architecture.save(path)
    module.main(
        argparse.Namespace(
            architecture=path,
            config="COCO-Detection/retinanet_R_50_FPN_1x.py",
            output=output,
            overrides=["train.max_iter=3"],
        )
    )
    cfg = LazyConfig.load(output)
    assert cfg.train.max_iter == 3
    model = instantiate(cfg.model).eval()
    convs = searchable(model.backbone, ["res*"])
    found = {n: tuple(c.segments) for n, c in convs.items() if isinstance(c, GroupedDilationConv2d)}
    assert found == dict(architecture.layers)
    # the same keys as the plain model, and the zoo config's frozen stages
    plain = instantiate(
        module.model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py").model
    )
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not convs["res2.0.conv2"].weight.requires_grad
    with torch.no_grad():
        assert "instances" in model([{"image": torch.rand(3, 64, 64) * 255}])[0]


def test_torchvision(tmp_path, capsys):
    """It searches; what it leaves is a plain detector's state dict, and finds what it found."""
    module = example("torchvision_search")
    torch.manual_seed(0)
    arguments = {"output": str(tmp_path), "iterations": 3, "size": 64, "images": 2}
    module.main(argparse.Namespace(**arguments))
    assert re.search(r"wrote .*/detector.pth \(AP \d", capsys.readouterr().out)
    state_dict = torch.load(tmp_path / "detector.pth", weights_only=True)
    detector = module.plain_detector(64)
    assert list(state_dict) == list(detector.state_dict())
    detector.load_state_dict(state_dict)
    architecture = Architecture.load(str(tmp_path / "architecture.yaml"))
    assert (
        architecture.stages == ("res3", "res4", "res5") and architecture.search["order"] == "voted"
    )


def test_timm(tmp_path, capsys):
    timm = pytest.importorskip("timm")
    module = example("timm_search")
    torch.manual_seed(0)
    arguments = {"output": str(tmp_path), "model": "resnet18", "iterations": 3, "size": 64}
    module.main(argparse.Namespace(**arguments))
    assert re.search(r"\(\d+% right on 8 images\)", capsys.readouterr().out)
    state_dict = torch.load(tmp_path / "model.pth", weights_only=True)
    timm.create_model("resnet18", num_classes=5).load_state_dict(state_dict)
    assert Architecture.load(str(tmp_path / "architecture.yaml")).stages == ("res3", "res4", "res5")


@pytest.mark.parametrize(
    "name, needed", [("rtdetr_search", "transformers"), ("timm_detector_search", "timm")]
)
def test_networks_by_paths(tmp_path, capsys, monkeypatch, name, needed):
    """They search; what they leave is a plain detector's state dict."""
    pytest.importorskip(needed)
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    module = example(name)
    torch.manual_seed(0)
    arguments = {"output": str(tmp_path), "iterations": 3, "size": 64, "images": 2}
    arguments.update(model="regnetx_002", convs=["body.s4.*", "fpn.layer_blocks.*"])
    module.main(argparse.Namespace(**arguments))
    assert re.search(r"wrote .*/detector.pth \((AP|loss) \d", capsys.readouterr().out)
    architecture = Architecture.load(str(tmp_path / "architecture.yaml"))
    assert len(architecture.layers) > 7
    plain = module.plain_detector(*(["regnetx_002", 64] if needed == "timm" else []))
    plain.load_state_dict(torch.load(tmp_path / "detector.pth", weights_only=True))


def tiny_config(tmp_path, meta_architecture="GeneralizedRCNN"):
    """Of a frozen detector."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    cfg = load_config(str(path), ["MODEL.META_ARCHITECTURE", meta_architecture])
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    if meta_architecture == "RetinaNet":
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
        cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 50
    return export_config(cfg, mixed_architecture(8))


def randomized(cfg):
    """The detector with random weights, in eval mode."""
    torch.manual_seed(0)
    return build_model(cfg).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["GeneralizedRCNN", "RetinaNet"])
def test_torchscript(tmp_path, kind):
    module, model = example("export_detector"), randomized(tiny_config(tmp_path, kind))
    image, other = torch.rand(3, 64, 96) * 255, torch.rand(3, 96, 128) * 255
    with torch.no_grad():
        adapter = module.traceable(model, other)
        expected = adapter(other)
        assert len(expected[0]) > 10
        traced = module.trace(model, image)(other)
        assert module.difference(traced, expected) < 1e-5


def test_onnx(tmp_path, capsys):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    cfg, files = tiny_config(tmp_path), {"config_file": "a.yaml", "weights": "a.pth", "output": "x"}
    files = {name: str(tmp_path / file) for name, file in files.items()}
    write_config(cfg, files["config_file"])
    torch.save({"model": randomized(cfg).state_dict()}, files["weights"])
    example("export_detector").main(argparse.Namespace(**files))
    found = re.findall(r"wrote (.+) \(largest .* (\S+)\)", capsys.readouterr().out)
    names = [os.path.basename(path) for path, _ in found]
    assert names == ["traced.ts", "detector.onnx", "backbone.onnx"]
    assert all(os.path.isfile(path) for path, _ in found)
    assert max(float(value) for _, value in found) < 1e-4, found
