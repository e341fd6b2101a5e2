"""Networks of timm, transformers and torchvision's detectors, each kind once; mmcv's conv."""

import logging

import pytest
import torch
import torchvision
from networks import check_searched_and_frozen
from torch import nn

from detectron2_nats import NATSError, SearchSpace, to_supernet
from detectron2_nats.look.receptive_field import field_extents
from detectron2_nats.method.names import searched_layers

SPACE = [[[1, 1], [1, 3], [3, 1], [2, 2]]]

# what is built: pattern, number of convs that are searched, and of others that match
TIMM = {
    "regnetx_002": ("s?.*", 13, 0),
    "convnext_atto": ("stages.*", 12, 3),  # the others: 2×2 convs that halve the map
    "mobilenetv3_small_050": ("blocks.*", 11, 0),
    "efficientnet_lite0": ("blocks.*", 16, 0),
    "tf_efficientnet_lite0": ("blocks.*", 12, 4),  # Conv2dSame, of stride 2
    "hgnetv2_b0": ("*", 20, 2),  # its stem has even kernels
    "res2net50_14w_8s": ("layer[12].*", 49, 0),
    "resnest14d": ("layer*", 4, 0),
    "hrnet_w18_small": ("stage[23].*", 25, 0),
    "cspdarknet53": ("stages.[012].*", 14, 0),
    "resnetv2_18": ("stages.*", 16, 0),
    "resnetv2_50x1_bit": ("stages.*", 0, 16),  # weight-standardised
    "skresnet18": ("layer*", 24, 0),
    "vgg11": ("features_*", 8, 0),
    "darknet53": ("stages.[01].*", 5, 0),
    "resnet50d": ("res[345].*", 13, 0),
    "resnext50_32x4d": ("res[345].*", 13, 0),
    "seresnet50": ("res[345].*", 13, 0),
    "legacy_seresnet18": ("res[345].*", 12, 0),
    "resnetaa50": ("res[345].*", 13, 0),  # its strides lie in the blur
    "resnetblur18": ("res[345].*", 12, 0),
}


def timm_network(name):
    timm = pytest.importorskip("timm")
    options = {"features_only": True} if name == "vgg11" else {"num_classes": 3}
    network = timm.create_model(name, **options)
    for part in network.modules():  # at the start some of these let nothing through
        if isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
        if isinstance(getattr(part, "gamma", None), nn.Parameter):  # ConvNeXt's
            nn.init.ones_(part.gamma)
    return network


def detector(name):
    build = getattr(torchvision.models.detection, name)
    return build(weights=None, weights_backbone=None, num_classes=3)


def rt_detr(backbone="resnet"):
    transformers = pytest.importorskip("transformers")
    common = dict(
        encoder_in_channels=[32, 64, 128],
        encoder_hidden_dim=32,
        d_model=32,
        num_queries=20,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        decoder_in_channels=[32, 32, 32],
        num_labels=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    )
    maps = ["stage2", "stage3", "stage4"]
    if backbone == "resnet":
        own = transformers.RTDetrResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1] * 4, out_features=maps
        )
        own.layer_type = "basic"
        config = transformers.RTDetrConfig(backbone_config=own, **common)
        return transformers.RTDetrForObjectDetection(config)
    own = transformers.HGNetV2Config(
        stem_channels=[3, 8, 16],
        hidden_sizes=[16, 32, 64, 128],
        stage_in_channels=[16, 16, 32, 64],
        stage_mid_channels=[8, 16, 16, 32],
        stage_out_channels=[16, 32, 64, 128],
        stage_num_blocks=[1] * 4,
        stage_numb_of_layers=[2] * 4,
        out_features=maps,
    )
    config = transformers.DFineConfig(backbone_config=own, **common)
    return transformers.DFineForObjectDetection(config)


OTHERS = {
    "SSD": (lambda: detector("ssd300_vgg16").head, ["*"], 12, 0),
    "SSDlite": (lambda: detector("ssdlite320_mobilenet_v3_large").head, ["*"], 12, 0),
    "FCOS": (lambda: detector("fcos_resnet50_fpn").head, ["*"], 11, 0),
    "RetinaNet": (lambda: detector("retinanet_resnet50_fpn").head, ["*"], 10, 0),
    "RT-DETR": (rt_detr, ["*.stages.?.layers.*", "*.pan_blocks.*"], 14, 0),
    "D-FINE": (lambda: rt_detr("hgnet"), ["*"], 47, 2),
}


@pytest.mark.parametrize("name", [*TIMM, *OTHERS])
def test_a_network_of_each_kind_is_searched_and_frozen(name, caplog):
    if name in TIMM:
        pattern, searched, not_searched = TIMM[name]
        build, patterns = (lambda: timm_network(name)), [pattern]
    else:
        build, patterns, searched, not_searched = OTHERS[name]
    space = SearchSpace(SPACE * len(patterns), patterns, num_groups=4, sample=True)
    if not searched:
        with pytest.raises(NATSError, match="matches no conv that can be searched: .*StdConv2d"):
            to_supernet(build(), space)
        return
    with caplog.at_level(logging.WARNING, "detectron2_nats"):
        supernet = check_searched_and_frozen(build, space)
    assert len(searched_layers(supernet)) == searched
    left = [r.getMessage() for r in caplog.records if "left as they are" in r.getMessage()]
    assert len(left) == bool(not_searched)
    assert not left or left[0].count("(kernel") + left[0].count("Conv2dSame") == not_searched


@pytest.mark.parametrize("backbone", ["resnet", "hgnet"])
def test_fields_of_a_transformers_maps(backbone):
    """Its logits have four axes, too, and no field; its encoder's maps have."""
    fields = field_extents(rt_detr(backbone), [torch.randn(3, 128, 128)], sides=((128, 1),))
    assert list(fields) == [f"encoder_last_hidden_state {i}" for i in range(3)]
