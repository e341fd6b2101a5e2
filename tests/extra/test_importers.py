"""tools/import_architecture.py: IC-Conv's and RF-Next's files become architectures that fit."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from oracles import image, tiny_cfg

from detectron2.modeling import build_backbone
from detectron2_nats import Architecture, apply_architecture

SCRIPT = Path(__file__).resolve().parents[2] / "tools/import_architecture.py"
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
importer = runpy.run_path(str(SCRIPT))
from_ic_conv, from_rf_next = importer["from_ic_conv"], importer["from_rf_next"]


def ic_conv(depth=50):
    """A pattern in IC-Conv's format: half plain, the rest shared by two dilations."""
    pattern = []
    for stage, blocks in enumerate(DEPTHS[depth]):
        quarter = 16 * 2**stage
        counts = {"(0, 0)": 2 * quarter, "(0, 3)": quarter - 1, "(1, 0)": 0, "(3, 2)": quarter + 1}
        pattern += [counts] * blocks
    return pattern


def rf_next(depth=50):
    """A structure in mmcv's format, of mmdet's ResNet; layer1 skipped as in its configs."""
    structure = {
        f"module.backbone.layer{layer + 1}.{block}.conv2": 1 + (block + layer) % 3
        for layer, blocks in enumerate(DEPTHS[depth])
        for block in range(blocks)
        if layer
    }
    structure["module.backbone.layer2.1.conv2"] = [1, 3]  # as fixed modes write them
    structure["module.neck.fpn_convs.0.conv"] = 1
    structure["module.rpn_head.rpn_conv"] = 2
    return {"search": {"step": 11}, "structure": structure}


def check_fits(layers, depth):
    """The network of full width takes the layers, keeps its keys, and computes."""
    opts = ["RESNETS.DEPTH", depth, "RESNETS.NORM", "FrozenBN", "RESNETS.OUT_FEATURES", ["res5"]]
    opts += ["RESNETS.STEM_OUT_CHANNELS", 64, "RESNETS.RES2_OUT_CHANNELS", 256]
    backbone = build_backbone(tiny_cfg(model_options=[*opts, "RESNETS.WIDTH_PER_GROUP", 64]))
    shapes = {k: v.shape for k, v in backbone.state_dict().items()}
    apply_architecture(backbone, Architecture(layers))
    assert {k: v.shape for k, v in backbone.state_dict().items()} == shapes
    with torch.no_grad():
        assert backbone.eval()(image())["res5"].shape == (1, 2048, 2, 2)


@pytest.mark.parametrize("depth", [50, 101])
def test_ic_conv_by_hand(depth):
    layers = from_ic_conv(ic_conv(depth))
    assert len(layers) == sum(DEPTHS[depth])
    assert list(layers)[2:4] == ["res2.2.conv2", "res3.0.conv2"]
    # keys hold dilations less one; empty entries vanish; the file's order stays
    assert layers["res2.0.conv2"] == [(32, 1, 1), (15, 1, 4), (17, 4, 3)]
    check_fits(layers, depth)
    half = from_ic_conv(ic_conv(depth), width=32)  # 7.5 and 8.5 channels: each end is rounded
    assert half["res2.0.conv2"] == [(16, 1, 1), (8, 1, 4), (8, 4, 3)]


@pytest.mark.parametrize("depth", [50, 101])
def test_rf_next_by_hand(depth, capsys):
    layers = from_rf_next(rf_next(depth))
    assert layers["res3.0.conv2"] == [(128, 2, 2)] and layers["res3.1.conv2"] == [(128, 1, 3)]
    assert layers["res5.2.conv2"] == [(512, 3, 3)] and len(layers) == sum(DEPTHS[depth][1:])
    assert capsys.readouterr().out.startswith("left out 'rpn_head.rpn_conv'")
    check_fits(layers, depth)


def structure(name, value=2):
    return {"structure": {**rf_next()["structure"], name: value}}


@pytest.mark.parametrize(
    "method, content, message",
    [
        ("ic-conv", {}, "not an IC-Conv pattern"),
        ("ic-conv", ic_conv()[1:], "pattern of 15 convs: expected 16 .ResNet-50. or 33"),
        ("ic-conv", [{"0, 0": 64}, *ic_conv()[1:]], "res2.0.conv2: key '0, 0': expected one like"),
        ("ic-conv", [{"(0, 0)": -1}, *ic_conv()[1:]], "-1 is no number of channels"),
        ("rf-next", [], "not an RF-Next structure"),
        ("rf-next", {"structure": {"module.neck.conv": 2}}, "it names no 3x3 conv of a backbone"),
        ("rf-next", structure("backbone.layer2.0.conv2", 0), "res3.0.conv2: malformed dilation"),
        ("rf-next", structure("backbone.layer2.0.convs.1"), "is not a 3x3 conv of a ResNet"),
        ("rf-next", None, "not readable as JSON"),
    ],
)
def test_what_is_malformed_is_refused_in_one_line(
    tmp_path, monkeypatch, capsys, method, content, message
):
    path, output = tmp_path / "strange.json", tmp_path / "out.yaml"
    path.write_text("[" if content is None else json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["", method, str(path), "--output", str(output)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and re.search(message, line), line
    assert not output.exists()
