"""Convs of any kernel and network, chosen by patterns of their names."""

import copy
import logging
import pickle
from functools import partial

import pytest
import torch
import torchvision
from oracles import has_dilations
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from detectron2_nats import (
    Architecture,
    GroupedDilationConv2d,
    MixedDilationConv2d,
    NATSError,
    SearchSpace,
    alpha_parameters,
    alpha_training,
    apply_architecture,
    frozen_state_dict,
    to_supernet,
)
from detectron2_nats.look.receptive_field import field_extents
from detectron2_nats.method.names import named_convs, searchable, searched_layers

SPACE = [[[1, 1], [1, 3], [3, 1], [2, 2]]]


def timm_network(name, **options):
    network = pytest.importorskip("timm").create_model(name, **options)
    for part in network.modules():  # at the start some of these let nothing through
        if isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
        if isinstance(getattr(part, "gamma", None), nn.Parameter):  # ConvNeXt's
            nn.init.ones_(part.gamma)
    return network


def head(name):
    build = getattr(torchvision.models.detection, name)
    return build(weights=None, weights_backbone=None, num_classes=3).head


def rt_detr(name):
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
    if name == "RT-DETR":
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


# what is built, patterns, number of convs that are searched, and of others that match
NETWORKS = {
    "regnetx_002": (timm_network, ["s?.*"], 13, 0),
    "convnext_atto": (
        timm_network,
        ["stages.*"],
        12,
        3,
    ),  # the others: 2×2 convs that halve the map
    "mobilenetv3_small_050": (timm_network, ["blocks.*"], 11, 0),
    "efficientnet_lite0": (timm_network, ["blocks.*"], 16, 0),
    "tf_efficientnet_lite0": (timm_network, ["blocks.*"], 12, 4),  # Conv2dSame, of stride 2
    "hgnetv2_b0": (timm_network, ["*"], 20, 2),  # its stem has even kernels
    "res2net50_14w_8s": (timm_network, ["layer[12].*"], 49, 0),
    "resnest14d": (timm_network, ["layer*"], 4, 0),
    "skresnet18": (timm_network, ["layer*"], 24, 0),
    "hrnet_w18_small": (timm_network, ["stage[23].*"], 25, 0),
    "cspdarknet53": (timm_network, ["stages.[012].*"], 14, 0),
    "resnetv2_18": (timm_network, ["stages.*"], 16, 0),
    "vgg11": (partial(timm_network, features_only=True), ["features_[0-8]"], 4, 0),
    "darknet53": (timm_network, ["stages.[01].*"], 5, 0),
    "ssd300_vgg16": (head, ["*"], 12, 0),
    "ssdlite320_mobilenet_v3_large": (head, ["*"], 12, 0),
    "fcos_resnet50_fpn": (head, ["*"], 11, 0),
    "retinanet_resnet50_fpn": (head, ["*"], 10, 0),
    "RT-DETR": (rt_detr, ["*.stages.?.layers.*", "*.pan_blocks.*"], 14, 0),
    "D-FINE": (rt_detr, ["*"], 47, 2),
}
HEADS = {
    "SSDHead": [512, 1024, 512, 256, 256, 256],
    "SSDLiteHead": [672, 480, 512, 256, 256, 128],
    "FCOSHead": [256, 256],
    "RetinaNetHead": [256, 256],
}


def outputs(network):
    """What a network returns, flat; of a detector's head, for maps of its widths."""
    generator = torch.Generator().manual_seed(0)
    widths = HEADS.get(type(network).__name__)
    if widths:
        found = network([torch.randn(2, c, 6, 6, generator=generator) for c in widths])
    else:
        found = network(torch.randn(2, 3, 64, 64, generator=generator))
    if isinstance(found, dict):
        found = list(found.values())
    parts = found if isinstance(found, list) else [found]
    return [part for part in parts if torch.is_tensor(part) and part.is_floating_point()]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, tmp_path, caplog):
    """To super-network, one α step, decode, save, load, freeze: equal outputs."""
    build, patterns, searched, others = NETWORKS[name]
    torch.manual_seed(0)
    plain = build(name).eval()
    space = SearchSpace(SPACE * len(patterns), patterns, num_groups=4, sample=True)
    with caplog.at_level(logging.WARNING, "detectron2_nats"):
        supernet = to_supernet(copy.deepcopy(plain), space)
    assert len(searched_layers(supernet)) == searched
    left = [r.getMessage() for r in caplog.records if "left as they are" in r.getMessage()]
    assert sum(line.count("(kernel") + line.count("Conv2dSame") for line in left) == others
    with torch.no_grad():  # α = 0 votes for (1, 1): the plain network, bit for bit
        for ours, theirs in zip(outputs(supernet), outputs(plain), strict=True):
            assert torch.equal(ours, theirs)
    before = {k: v.clone() for k, v in supernet.train().state_dict().items()}
    adam = torch.optim.Adam(alpha_parameters(supernet), lr=1.0)
    with alpha_training(supernet):
        sum(y.square().sum() for y in outputs(supernet)).backward()
        adam.step()
    changed = [k for k, v in supernet.state_dict().items() if not torch.equal(v, before[k])]
    assert changed and all(key.endswith(".alpha") for key in changed)
    for alpha in alpha_parameters(supernet):  # whatever the step said: all dilations somewhere
        assert alpha.isfinite().all()
        alpha.data.copy_(torch.randn(alpha.shape))

    architecture = Architecture.decode(supernet.eval(), "voted")
    path = str(tmp_path / "architecture.yaml")
    architecture.save(path)
    assert Architecture.load(path) == architecture
    plain.load_state_dict(frozen_state_dict(supernet, architecture))
    with torch.no_grad():
        undilated, expected = outputs(plain), outputs(supernet)
        keys = {k: v.shape for k, v in plain.state_dict().items()}
        frozen = apply_architecture(plain, path)
        assert {k: v.shape for k, v in frozen.state_dict().items()} == keys
        for ours, theirs in zip(outputs(frozen), expected, strict=True):
            scale = theirs.abs().max().clamp(min=1e-30)  # random weights may give 1e-10
            torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-4, atol=1e-5)
        assert any((a - b).abs().max() > 1e-3 * b.abs().max() for a, b in zip(undilated, expected))


def test_weight_standardised_convs_are_named():
    network = timm_network("resnetv2_50x1_bit")
    with pytest.raises(NATSError, match="matches no conv that can be searched: .*StdConv2d"):
        to_supernet(network, SearchSpace("A", ["stages.*"]))


def test_fields_of_a_transformer():
    """Its logits have four axes, too, and no field; its encoder's maps have."""
    fields = field_extents(rt_detr("D-FINE"), [torch.randn(3, 128, 128)], sides=((128, 1),))
    assert list(fields) == [f"encoder_last_hidden_state {i}" for i in range(3)]


# -- the convs ------------------------------------------------------------------------------

CONVS = {
    "3x3": dict(kernel_size=3, padding=1),
    "stride": dict(kernel_size=3, padding=1, stride=2),
    "5x5": dict(kernel_size=5, padding=2, bias=False),
    "7x7 depthwise": dict(kernel_size=7, padding=3, groups=16),
    "5x5 depthwise": dict(kernel_size=5, padding=2, groups=16),
    "3x3 in groups": dict(kernel_size=3, padding=1, groups=4),
    "1x5": dict(kernel_size=(1, 5), padding=(0, 2)),
    "5x1": dict(kernel_size=(5, 1), padding=(2, 0)),
    "same": dict(kernel_size=5, padding="same"),
    "dilated": dict(kernel_size=3, padding=(2, 4), dilation=(2, 4)),
}


def one_conv(kind, dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(16, 16, **CONVS[kind]).to(dtype))


@pytest.mark.parametrize("kind", CONVS)
def test_a_conv_is_the_mixture_of_the_formula(kind):
    """y_i = Σ_g softmax(α_i)^g · y^g_i, each y^g by PyTorch's own conv with that dilation."""
    plain = one_conv(kind)
    supernet = to_supernet(copy.deepcopy(plain), SearchSpace(SPACE, ["0"], num_groups=4))
    (conv,) = searched_layers(supernet).values()
    conv.alpha.data.normal_()
    x = torch.randn(2, 16, 13, 17, dtype=torch.float64)
    shares = conv.alpha.softmax(1).repeat_interleave(4, 0)
    expected = 0
    for index, genotype in enumerate(conv.genotypes):
        own = dict(CONVS[kind])
        base = own.pop("dilation", (1, 1))
        kernel = own.pop("kernel_size")
        dilation = [b * d for b, d in zip(base, genotype)]
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        own.update(padding=[d * (k - 1) // 2 for d, k in zip(dilation, sides)], dilation=dilation)
        theirs = nn.Conv2d(16, 16, kernel, **own).double()
        theirs.load_state_dict(plain[0].state_dict())
        expected = expected + theirs(x) * shares[:, index].view(1, -1, 1, 1)
    torch.testing.assert_close(supernet(x), expected)


@pytest.mark.parametrize("kind", CONVS)
def test_frozen_conv_against_rows_of_plain_ones(kind):
    plain = one_conv(kind)
    segments = [[4, 1, 1], [4, 3, 1], [4, 1, 3], [4, 3, 1]]
    frozen = apply_architecture(copy.deepcopy(plain), Architecture({"0": segments}))
    x = torch.randn(2, 16, 13, 17, dtype=torch.float64)
    y = frozen(x)
    for index, (_, *dilation) in enumerate(segments):
        single = Architecture({"0": [[16, *dilation]]})
        expected = apply_architecture(copy.deepcopy(plain), single)(x)
        rows = slice(4 * index, 4 * index + 4)
        torch.testing.assert_close(y[:, rows], expected[:, rows])


def test_a_side_of_one_has_no_dilations():
    supernet = to_supernet(one_conv("1x5"), SearchSpace(SPACE, ["*"]))
    (conv,) = searched_layers(supernet).values()
    assert conv.genotypes == ((1, 1), (1, 3), (1, 2))


@pytest.mark.parametrize(
    "channels, conv_groups, space, expected",
    [
        (64, 1, dict(num_groups=16), 16),
        (24, 1, dict(num_groups=16), 12),
        (24, 24, dict(num_groups=16), 12),
        (64, 2, dict(num_groups=16), 2),
        (17, 1, dict(num_groups=16), 1),
        (48, 1, dict(channels_per_group=10), 4),
        (8, 1, dict(channels_per_group=10), 1),
    ],
)
def test_groups_that_fit(channels, conv_groups, space, expected):
    space = SearchSpace("A", ["*"], **space)
    assert space.groups_of("x", channels, conv_groups) == expected


def test_a_module_in_two_places_is_one_conv():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    network = nn.ModuleDict({"a": nn.Sequential(conv), "b": conv, "c": nn.Conv2d(4, 4, 1)})
    to_supernet(network, SearchSpace("A", ["*"]))
    assert isinstance(network["b"], MixedDilationConv2d) and network["a"][0] is network["b"]


def test_modules_that_are_called_from_lists():
    """As Detectron2's FPN does."""

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
            self._convs, self.pair, self.named = [[self.a]], (self.b,), {"b": lambda: self.b}

        def forward(self, x):
            return self.named["b"]()(self.pair[0](self._convs[0][0](x)))

    plain, x = Listed(), torch.randn(1, 4, 9, 9)
    wide = {name: [[2, 1, 1], [2, 3, 3]] for name in "ab"}
    before = plain(x)
    frozen = apply_architecture(plain, Architecture(wide))
    assert torch.equal(frozen(x), frozen.b(frozen.b(frozen.a(x))))
    assert not torch.equal(frozen(x), before)
    assert isinstance(frozen._convs[0][0], GroupedDilationConv2d) and frozen.pair[0] is frozen.b


# -- what cannot be searched ----------------------------------------------------------------


def test_reasons():
    network = nn.ModuleDict(
        {
            "valid": nn.Conv2d(4, 4, 3),
            "reflect": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            "even": nn.Conv2d(4, 4, 4, padding=1),
            "normed": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
            "deformable": torchvision.ops.DeformConv2d(4, 4, 3, padding=1),
            "one": nn.Conv2d(4, 4, 1),
            "up": nn.ConvTranspose2d(4, 4, 2, stride=2),
            "pool": nn.MaxPool2d(3),
            "left": nn.Conv2d(4, 4, 3, padding=1),
            "right": nn.Conv2d(4, 4, 3, padding=1),
            "plain": nn.Conv2d(4, 4, 3, padding=1),
        }
    )
    network["right"].weight = network["left"].weight
    assert list(searchable(network)) == ["plain"]
    reasons = {name: named.why_not for name, named in named_convs(network).items()}
    assert {name: why_not for name, why_not in reasons.items() if why_not} == {
        "valid": "kernel (3, 3), padding (0, 0) of zeros, not (1, 1) of zeros",
        "reflect": "kernel (3, 3), padding (1, 1) of reflect, not (1, 1) of zeros",
        "even": "kernel (4, 4), padding (1, 1) of zeros, not an odd kernel above 1",
        "normed": "its weight is computed (weight_norm, pruning, …)",
        "deformable": "DeformConv2d",
        "left": "it shares its weight with right",
        "right": "it shares its weight with left",
    }


@pytest.mark.parametrize(
    "patterns, message",
    [
        (["blcoks.*"], r"'blcoks.\*' matches no conv .*: near are blocks.\*"),
        (["nowhere", "*"], "'nowhere' matches no conv"),
        (["head"], "'head' matches no conv .*: head: kernel"),
        (["blocks.*", "blocks.0"], "'blocks.0' matches .*: blocks.0 belongs to 'blocks.*', which"),
        ([], "CONVS .*expected a list of patterns"),
        ("blocks.*", "CONVS 'blocks.*': expected a list of patterns"),
        (["a", "a"], "each once"),
    ],
)
def test_patterns_that_fail(patterns, message):
    blocks = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)])
    network = nn.ModuleDict({"blocks": blocks, "head": nn.Conv2d(4, 4, 3)})
    before = copy.deepcopy(network)
    with pytest.raises(NATSError, match=message):
        to_supernet(network, SearchSpace("A", patterns))
    assert repr(network) == repr(before)


def test_frozen_convs_are_left_alone(caplog):
    blocks = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)])
    blocks[0].requires_grad_(False)
    with caplog.at_level(logging.WARNING, "detectron2_nats"):
        to_supernet(blocks, SearchSpace("A", ["*"], num_groups=2))
    assert "0 (it is frozen (takes no gradient))" in caplog.text
    assert list(searched_layers(blocks)) == ["1"]
    blocks = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)])
    blocks[0].requires_grad_(False)
    with pytest.raises(NATSError, match="'0': nothing to search: 0: it is frozen"):
        to_supernet(blocks, SearchSpace("A", ["0", "1"]))


def test_a_kernel_that_cannot_tell_dilations_apart(caplog):
    """Of one column: what reaches further along the width is the same conv."""
    network = nn.Sequential(nn.Conv2d(4, 4, (5, 1), padding=(2, 0)))
    with pytest.raises(NATSError, match=r"0: a kernel \(5, 1\) cannot tell its dilations apart"):
        to_supernet(network, SearchSpace([[[1, 1], [1, 3]]], ["*"]))


def test_names_that_a_file_could_not_hold(tmp_path):
    """Any key of a ModuleDict is fine, but for spaces; said before the search, not after it."""
    path = str(tmp_path / "architecture.yaml")
    for name in ("p3-out", "true", "1e3", "0", "a:b", "#x", "{x}", "'", "~"):
        network = nn.ModuleDict({name: nn.Conv2d(4, 4, 3, padding=1)})
        to_supernet(network, SearchSpace("A", ["*"]))
        Architecture.decode(network).save(path)
        assert list(Architecture.load(path).layers) == [name]
    network = nn.ModuleDict({"a b": nn.Conv2d(4, 4, 3, padding=1)})
    with pytest.raises(NATSError, match="layer name 'a b'"):
        to_supernet(network, SearchSpace("A", ["*"]))


def necks():
    neck = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    return nn.ModuleDict({"neck": neck, "head": nn.Conv2d(4, 4, 3), "p2": copy.deepcopy(neck[0])})


@pytest.mark.parametrize(
    "layers, message",
    [
        ({"neck.1": [[4, 1, 1]]}, r"lacks neck.1: near are neck.\*"),
        ({"head": [[4, 1, 1]]}, r"does not fit: head: kernel \(3, 3\), padding \(0, 0\)"),
        ({"0": [[4, 1, 1]], "neck.0": [[4, 1, 1]]}, "lacks 0: near"),
        ({"neck.0": [[8, 1, 1]]}, "does not fit neck.0: segments of 8 channels"),
    ],
)
def test_an_architecture_of_paths_that_does_not_fit(layers, message):
    with pytest.raises(NATSError, match=message):
        apply_architecture(necks(), Architecture(layers))


def test_names_that_are_paths_hold_in_the_network_and_around_it():
    """Searched in a backbone, they fit the detector; but not where two parts have them."""
    wide = Architecture({"neck.0": [[2, 1, 1], [2, 1, 3]], "p2": [[4, 1, 3]]})
    detector = nn.ModuleDict({"backbone": necks(), "heads": nn.Conv2d(4, 4, 3, padding=1)})
    apply_architecture(detector, wide)
    inside = apply_architecture(necks(), wide)
    assert repr(detector["backbone"]) == repr(inside)
    with pytest.raises(NATSError, match="neck.0 is searched or dilated already"):
        apply_architecture(detector, wide)
    two = nn.ModuleDict({"student": necks(), "teacher": necks()})
    with pytest.raises(
        NATSError, match=r"lacks neck.0, p2: near are teacher.neck.\*, student.neck"
    ):
        apply_architecture(two, wide)


# -- never silently undilated -----------------------------------------------------------------

SINGLE, SEVERAL = [[8, 1, 3]], [[4, 1, 1], [4, 1, 3]]


def conv_and_norm(segments):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    network[1].running_mean.normal_(), network[1].weight.data.uniform_(0.5, 2)
    return apply_architecture(network.eval(), Architecture({"0": segments}))


def fused_by_torch(network):
    return nn.Sequential(fuse_conv_bn_eval(network[0], network[1]), network[2])


def folded(conv, norm):
    """Weight and bias of both."""
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    return fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)


def fused_into_a_new_conv(network):
    """As YOLOX and older YOLOs do; they copy no dilation."""
    conv = network[0]
    fused = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding
    )
    fused.weight, fused.bias = folded(conv, network[1])
    return nn.Sequential(fused, network[2])


def with_weights_of_its_own(network):
    """As mmcv's efficient_conv_bn_eval does."""
    conv = network[0]
    return lambda x: network[2](conv._conv_forward(x, *folded(conv, network[1])))


@pytest.mark.parametrize("segments", [SINGLE, SEVERAL], ids=["one", "several"])
@pytest.mark.parametrize(
    "program",
    [
        fused_by_torch,
        with_weights_of_its_own,
        fuse,
        lambda network: pickle.loads(pickle.dumps(network)),
    ],
    ids="torch own-weights fx pickle".split(),
)
@torch.no_grad()
def test_programs_that_keep_the_dilation(program, segments):
    network = conv_and_norm(segments)
    x = torch.randn(2, 4, 9, 11)
    expected = network(x)
    torch.testing.assert_close(program(conv_and_norm(segments))(x), expected)


@torch.no_grad()
def test_programs_that_lose_it_are_stopped():
    with pytest.raises(ValueError, match="one for each dilation"):
        fused_into_a_new_conv(conv_and_norm(SEVERAL))
    # of a single dilation the padding is another, and so is the size of what comes out
    x = torch.randn(2, 4, 9, 11)
    lost = fused_into_a_new_conv(conv_and_norm(SINGLE))(x)
    assert lost.shape != conv_and_norm(SINGLE)(x).shape


def test_a_conv_of_one_dilation_keeps_its_class():
    class Own(nn.Conv2d):
        pass

    network = nn.Sequential(Own(4, 8, 3, padding="same"))
    conv = network[0]
    apply_architecture(network, Architecture({"0": SINGLE}))
    assert network[0] is conv and type(conv) is Own
    assert (conv.dilation, conv.padding) == ((1, 3), (1, 3)) and has_dilations(conv)
    with pytest.raises(NATSError, match="0 is searched or dilated already"):
        to_supernet(network, SearchSpace("A", ["*"]))
