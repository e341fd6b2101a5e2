"""IC-Conv's and RF-Next's files become architectures that fit Detectron2's ResNets."""

import json
from pathlib import Path

import pytest
import torch
from oracles import has_dilations, image, residual_convs, tiny_cfg

from detectron2.modeling import build_backbone
from detectron2_nats import Architecture, NATSError, apply_architecture
from detectron2_nats.bench.importers import from_ic_conv, from_rf_next, read_json

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
IC_CONV = Path(__file__).resolve().parents[3] / "shared/data/ic_conv/ic_resnet50_k9.json"


def ic_conv(depth=50, width=64):
    """A pattern in IC-Conv's format: half plain, the rest shared by two dilations."""
    pattern = []
    for stage, blocks in enumerate(DEPTHS[depth]):
        channels = width * 2**stage
        counts = {"(0, 0)": channels // 2, "(0, 3)": channels // 4 - 1, "(1, 0)": 0}
        pattern += [{**counts, "(3, 2)": channels // 4 + 1}] * blocks
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
    return {"search": {"step": 11, "skip_layer": ["stem", "layer1"]}, "structure": structure}


@pytest.mark.parametrize("depth", [50, 101])
def test_ic_conv_by_hand(depth):
    architecture = from_ic_conv(ic_conv(depth), "pattern.json")
    assert len(architecture.layers) == sum(DEPTHS[depth])
    first = ["res2.0.conv2", "res2.1.conv2", "res2.2.conv2", "res3.0.conv2"]
    assert list(architecture.layers)[:4] == first
    # keys hold dilations less one; empty entries vanish
    assert architecture.layers["res2.0.conv2"] == ((32, 1, 1), (15, 1, 4), (17, 4, 3))
    assert architecture.layers[f"res4.{DEPTHS[depth][2] - 1}.conv2"][0] == (128, 1, 1)
    assert architecture.search == {"method": "IC-Conv", "source": "pattern.json"}


def test_ic_conv_takes_keys_in_the_files_order():
    pattern = ic_conv()
    pattern[0] = {"(2, 0)": 10, "(0, 0)": 54}
    assert from_ic_conv(pattern).layers["res2.0.conv2"] == ((10, 3, 1), (54, 1, 1))


def full_width(depth=50, norm="FrozenBN", freeze_at=2):
    opts = ["RESNETS.DEPTH", depth, "RESNETS.NORM", norm, "BACKBONE.FREEZE_AT", freeze_at]
    opts += ["RESNETS.STEM_OUT_CHANNELS", 64, "RESNETS.RES2_OUT_CHANNELS", 256]
    opts += ["RESNETS.WIDTH_PER_GROUP", 64, "RESNETS.OUT_FEATURES", ["res2", "res5"]]
    return build_backbone(tiny_cfg(model_options=opts))


def test_ic_conv_fits_a_resnet50_with_frozen_stages():
    backbone = full_width()
    keys = {k: v.shape for k, v in backbone.state_dict().items()}
    apply_architecture(backbone, from_ic_conv(ic_conv()))
    convs = residual_convs(backbone)
    assert all(has_dilations(conv) for conv in convs.values())
    assert {k: v.shape for k, v in backbone.state_dict().items()} == keys
    # FREEZE_AT 2 froze the stem and res2: they stay so under their dilations
    trained = {name for name, conv in convs.items() if conv.weight.requires_grad}
    assert trained == {name for name in convs if not name.startswith("res2.")}
    with torch.no_grad():
        features = backbone.eval()(image())
    assert features["res5"].shape == (1, 2048, 2, 2)


@pytest.mark.skipif(not IC_CONV.exists(), reason="the published pattern is not here")
def test_the_published_ic_conv_pattern():
    content = json.loads(IC_CONV.read_text())
    architecture = from_ic_conv(read_json(str(IC_CONV)))
    assert len(architecture.layers) == 16
    for pattern, layer in zip(content, architecture.layers):
        counts = architecture.channels_per_dilation(layer)
        expected = {
            tuple(int(d) + 1 for d in key.strip("()").split(",")): channels
            for key, channels in pattern.items()
            if channels
        }
        assert counts == dict(sorted(expected.items()))
        assert sum(counts.values()) == 64 * 2 ** (int(layer[3]) - 2)
    apply_architecture(full_width(), architecture)


def test_rf_next_by_hand():
    architecture, left_out = from_rf_next(rf_next(), "step11.json")
    assert architecture.stages == ("res3", "res4", "res5")
    assert architecture.layers["res3.0.conv2"] == ((128, 2, 2),)
    assert architecture.layers["res3.1.conv2"] == ((128, 1, 3),)
    assert architecture.layers["res5.2.conv2"] == ((512, 3, 3),)
    assert left_out == ["rpn_head.rpn_conv"]
    assert architecture.search["method"] == "RF-Next"


def test_rf_next_fits_a_resnet101():
    architecture, _ = from_rf_next(rf_next(101))
    # block 10 follows block 9, not block 1
    names = [name for name in architecture.layers if name.startswith("res4")]
    assert names == [f"res4.{block}.conv2" for block in range(23)]
    backbone = apply_architecture(full_width(101), architecture)
    with torch.no_grad():
        assert backbone.eval()(image())["res5"].shape == (1, 2048, 2, 2)


def test_rf_next_basic_blocks_and_width():
    structure = {
        f"backbone.layer4.{block}.conv{conv}": block + conv for block in (0, 1) for conv in (1, 2)
    }
    architecture, _ = from_rf_next({"structure": structure}, width=32)
    assert architecture.layers["res5.1.conv2"] == ((256, 3, 3),)
    assert len(architecture.layers) == 4


@pytest.mark.parametrize(
    "name",
    [
        "module.backbone.layer2.0.convs.1",  # Res2Net
        "module.backbone.stage2.0.branches.0.0.conv1",  # HRNet
        "module.backbone.stages.0.0.depthwise_conv",  # ConvNeXt
        "module.backbone.layers.0.1.0.ffn.layers.1",  # PVT
        "module.backbone.layer2.0.conv2.conv_offset",  # deformable
    ],
)
def test_rf_next_refuses_other_backbones(name):
    content = rf_next()
    content["structure"][name] = 2
    with pytest.raises(NATSError, match=r"is not a 3x3 conv of a ResNet: only ResNet and"):
        from_rf_next(content)


def test_incomplete_stages_and_odd_widths_do_not_fit_a_network():
    """Applying an architecture checks both; the importers need not know how deep a network is."""
    content = rf_next()
    del content["structure"]["module.backbone.layer3.2.conv2"]
    architecture, _ = from_rf_next(content)
    with pytest.raises(NATSError, match="does not name res4.2.conv2"):
        apply_architecture(full_width(), architecture)
    pattern = ic_conv()
    pattern[1] = {"(0, 0)": 65}
    with pytest.raises(NATSError, match="res2.1.conv2: segments of 65 channels do not fit 64"):
        apply_architecture(full_width(), from_ic_conv(pattern))


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "not an RF-Next structure"),
        ({"structure": {}}, "not an RF-Next structure"),
        ({"structure": {"module.neck.conv": 2}}, "it names no 3x3 conv of a backbone"),
        ({"structure": {"backbone.layer2.0.conv2": 0}}, r"layer2.0.conv2.*malformed dilation"),
        ({"structure": {"backbone.layer2.0.conv2": True}}, "malformed dilation"),
        ({"structure": {"backbone.layer2.0.conv2": [1, 2, 3]}}, "malformed dilation"),
    ],
)
def test_rf_next_refuses_what_is_malformed(content, message):
    with pytest.raises(NATSError, match=message):
        from_rf_next(content)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: {}, "not an IC-Conv pattern"),
        (lambda p: [1] * 16, "not an IC-Conv pattern"),
        (lambda p: p[:-1], "pattern of 15 convs: expected 16 .ResNet-50. or 33 .ResNet-101."),
        (lambda p: [{"0, 0": 64}] + p[1:], r"res2.0.conv2: key '0, 0': expected one like \(0, 1\)"),
        (lambda p: [{"(0, 0)": 64.0}] + p[1:], "res2.0.conv2: 64.0 is not a number of channels"),
        (lambda p: [{"(0, 0)": -1}] + p[1:], "-1 is not a number of channels"),
        (lambda p: [{"(0, 0)": 0}] + p[1:], "res2.0.conv2 has no channels"),
        (lambda p: [{"(0, 900)": 64}] + p[1:], "malformed dilation"),
    ],
)
def test_ic_conv_refuses_what_is_malformed(change, message):
    with pytest.raises(NATSError, match=message):
        from_ic_conv(change(ic_conv()))


@pytest.mark.parametrize(
    "data, message",
    [
        (b"[", "not readable as JSON"),
        (b"\xff\xfe\x00", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b" " * (8 * 2**20 + 1), "larger than the limit of 8388608 bytes"),
    ],
)
def test_read_json_refuses(tmp_path, data, message):
    path = tmp_path / "strange.json"
    path.write_bytes(data)
    with pytest.raises(NATSError, match=message) as raised:
        read_json(str(path))
    assert "strange.json" in str(raised.value) and "\n" not in str(raised.value)


def test_read_json_missing(tmp_path):
    with pytest.raises(NATSError, match="cannot be read: No such file"):
        read_json(str(tmp_path / "none.json"))


def test_imported_file_round_trips(tmp_path):
    path = str(tmp_path / "ic.yaml")
    architecture = from_ic_conv(ic_conv(), "pattern.json")
    architecture.save(path)
    assert Architecture.load(path) == architecture
