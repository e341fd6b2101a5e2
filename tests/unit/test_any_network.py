"""Networks that Detectron2 did not build: residual ones of others, and convs of any name."""

import copy
import logging
import pickle

import pytest
import torch
import torchvision
from networks import check_searched_and_frozen, flat_outputs
from oracles import (
    assert_identical,
    build_plain,
    has_dilations,
    image,
    make_one_hot,
    randomized,
    residual_convs,
)
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, Bottleneck

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
from detectron2_nats.method.names import (
    named_convs,
    residual_stages,
    searchable,
    searched_layers,
)

ONE_SET = [[[1, 1], [1, 3], [3, 1], [2, 2]]]
SPACE = SearchSpace([[[1, 1], [1, 3]], [[1, 1], [3, 1]], [[1, 1], [2, 2]]], num_groups=4)

# -- residual networks ------------------------------------------------------------------------


class MMResLayer(nn.Sequential):
    """As mmdet's ResLayer: a subclass of nn.Sequential."""


class MMBottleneck(nn.Module):
    """As mmdet's: norms under names of their own, read through properties; caffe's stride."""

    def __init__(self, channels, width, stride=1):
        super().__init__()
        self.norm2_name = "bn2"
        self.conv1 = nn.Conv2d(channels, width, 1, stride=stride, bias=False)
        self.add_module("bn1", nn.BatchNorm2d(width))
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.add_module("bn2", nn.BatchNorm2d(width))
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.add_module("bn3", nn.BatchNorm2d(channels))
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride

    @property
    def norm2(self):
        return getattr(self, self.norm2_name)

    def forward(self, x):
        def _inner_forward(x):
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.relu(self.norm2(self.conv2(out)))
            return self.bn3(self.conv3(out)) + x[..., :: self.stride, :: self.stride]

        return self.relu(_inner_forward(x))


class MMResNet(nn.Module):
    """As mmdet's ResNet: layers are named in a list, and added by name."""

    def __init__(self, block=MMBottleneck):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, stride=4, padding=3, bias=False)
        self.add_module("bn1", nn.BatchNorm2d(16))
        self.res_layers = [f"layer{i}" for i in range(1, 5)]
        for index, name in enumerate(self.res_layers):
            first = block(16, 8, stride=1 if index == 0 else 2)
            self.add_module(name, MMResLayer(first, block(16, 8)))

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        outputs = {}
        for name in self.res_layers:
            x = outputs[name] = getattr(self, name)(x)
        return outputs


def resnet(block=Bottleneck, **kwargs):
    """Of torchvision; shallow and narrow."""
    if block is Bottleneck:
        kwargs.setdefault("width_per_group", 16)
    return torchvision.models.ResNet(block, [1, 2, 1, 1], num_classes=4, **kwargs)


def resnet_fpn():
    """As in torchvision's detectors."""
    layers = {f"layer{i}": str(i) for i in range(1, 5)}
    return BackboneWithFPN(resnet(), layers, [256, 512, 1024, 2048], 16)


MODELS = {
    "basic blocks": lambda: resnet(BasicBlock),
    "ResNeXt": lambda: resnet(groups=8, width_per_group=4),
    "DC5": lambda: resnet(replace_stride_with_dilation=[False, False, True]),
    "FPN": resnet_fpn,
    "mmdet": MMResNet,
}


def built(name):
    torch.manual_seed(0)
    return randomized(MODELS[name]()).eval()


def plain_architecture(model):
    convs = residual_convs(model)
    return Architecture({k: [[c.out_channels, 1, 1]] for k, c in convs.items()})


@pytest.mark.parametrize("name", MODELS)
def test_every_kind(name):
    """Names, keys, the plain network bit for bit, and the super-network that becomes frozen."""
    plain = built(name)
    layers = list(residual_convs(plain))
    convs = ("conv1", "conv2") if "res3.0.conv1" in layers else ("conv2",)
    assert layers == [
        f"{stage}.{block}.{conv}"
        for stage, path in residual_stages(plain).items()
        for block in range(len(plain.get_submodule(path)))
        for conv in convs
    ]
    same = apply_architecture(copy.deepcopy(plain), plain_architecture(plain))
    assert_identical(same.state_dict(), plain.state_dict())
    with torch.no_grad():
        for ours, theirs in zip(flat_outputs(same), flat_outputs(plain), strict=True):
            assert torch.equal(ours, theirs)
    searched = [name for name in layers if not name.startswith("res2")]
    supernet = check_searched_and_frozen(lambda: copy.deepcopy(plain), SPACE)
    assert list(searched_layers(supernet)) == searched


def test_one_architecture_for_detectron2_and_torchvision():
    """layer2.0.conv2 is res3.0.conv2: the same file, in the same order, on both."""
    ours, theirs = build_plain("R50"), torchvision.models.resnet50(width_per_group=16)
    assert list(residual_convs(ours)) == list(residual_convs(theirs))
    supernet = to_supernet(theirs, SPACE)
    assert supernet.layer2[0].conv2 is searched_layers(supernet)["res3.0.conv2"]
    make_one_hot(supernet)
    architecture = Architecture.decode(supernet)
    apply_architecture(ours, architecture)
    assert tuple(ours.res3[0].conv2.segments) == architecture.layers["res3.0.conv2"]
    # convs outside of the stages go by their paths, which libraries choose
    assert [name for name in named_convs(ours) if "res" not in name] == ["stem.conv1"]
    assert [name for name in named_convs(theirs) if "res" not in name] == ["conv1"]


def test_a_whole_detector_of_torchvision_takes_losses_and_detects():
    detector = FasterRCNN(resnet_fpn(), num_classes=3, min_size=64, max_size=96)
    keys = list(detector.state_dict())
    supernet = to_supernet(copy.deepcopy(detector), SPACE)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}
    with alpha_training(supernet):
        sum(supernet([image()[0]], [target]).values()).backward()
    assert all(alpha.grad.abs().sum() > 0 for alpha in alpha_parameters(supernet))
    frozen = apply_architecture(detector, Architecture.decode(supernet))
    assert list(frozen.state_dict()) == keys
    with torch.no_grad():
        assert set(frozen.eval()([image()[0]])[0]) == {"boxes", "labels", "scores"}


def test_parts_of_a_detector_that_only_sound_alike_are_passed_over():
    """`layer1` of something else, and what lies inside of a stage."""
    network = nn.ModuleDict({"backbone": resnet(BasicBlock), "neck": nn.Module()})
    network["neck"].layer1 = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
    network["neck"].layer2 = nn.Conv2d(8, 8, 3)
    network["neck"].layer3 = nn.Sequential()
    network["neck"].res3 = nn.Identity()
    network["backbone"].layer1[0].layer2 = nn.Sequential(copy.deepcopy(network["backbone"].layer1))
    assert residual_stages(network) == {f"res{i + 1}": f"backbone.layer{i}" for i in range(1, 5)}
    beside = named_convs(network)["backbone.layer1.0.layer2.0.0.conv1"].why_not
    assert beside == "it lies beside the main path of a residual stage"


def test_files_of_before_named_convs_by_their_paths_too():
    layers = {f"body.layer2.{i}.conv2": [[16, 1, 1], [16, 1, 3]] for i in range(2)}
    layers["fpn.layer_blocks.0.0"] = [[16, 1, 3]]
    for network in (resnet_fpn(), FasterRCNN(resnet_fpn(), num_classes=3)):
        apply_architecture(network, Architecture(layers))
        convs = named_convs(network)
        assert has_dilations(convs["res3.1.conv2"].conv)
    both = {**layers, "res3.0.conv2": [[32, 1, 1]], "res3.1.conv2": [[32, 1, 1]]}
    with pytest.raises(NATSError, match="the conv res3.0.conv2 twice, once by its path"):
        apply_architecture(resnet_fpn(), Architecture(both))


# -- convs of any kernel ----------------------------------------------------------------------

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
    supernet = to_supernet(copy.deepcopy(plain), SearchSpace(ONE_SET, ["0"], num_groups=4))
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
    supernet = to_supernet(one_conv("1x5"), SearchSpace(ONE_SET, ["*"]))
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


# -- what cannot be searched ------------------------------------------------------------------


def test_convs_that_are_more_or_less_than_a_conv_are_named():
    """To replace one by ours would silently change what the network computes."""

    class Standardised(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    network = nn.ModuleDict(
        {
            "valid": nn.Conv2d(4, 4, 3),
            "reflect": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            "even": nn.Conv2d(4, 4, 4, padding=1),
            "standardised": Standardised(4, 4, 3, padding=1),
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
        "standardised": "Standardised",
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


def test_two_networks_go_by_their_paths():
    two = nn.ModuleDict({"student": built("mmdet"), "teacher": build_plain("R50")})
    assert residual_stages(two) == {}
    message = r"near are teacher.res3.\*.conv2"
    with pytest.raises(NATSError, match=rf"'res3.\*' matches no conv .*{message}"):
        to_supernet(two, SPACE)
    of_one = Architecture.uniform(two["student"], (1, 3), ["res3.*"])
    with pytest.raises(NATSError, match=rf"lacks res3.0.conv2, res3.1.conv2: {message}"):
        apply_architecture(two, of_one)
    apply_architecture(two, Architecture.uniform(two, (1, 3), ["student.layer2.*"]))
    assert has_dilations(two["student"].layer2[0].conv2)
    assert not has_dilations(two["teacher"].res3[0].conv2)


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


# -- α, and the weights of a decoded network --------------------------------------------------


class Remembering(nn.Module):
    """Changes what it knows at each pass: in place, and by putting another tensor there."""

    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm2d(3, track_running_stats=True)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1))
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes = self.passes + 1
        return self.spectral(self.norm(x))


def test_alpha_training_changes_alpha_alone():
    model = to_supernet(randomized(resnet(BasicBlock)).train(), SPACE)
    model.conv1 = nn.Sequential(Remembering(), model.conv1)
    model.fc.bias.requires_grad_(False)  # stays so
    alphas = alpha_parameters(model)
    assert [id(a) for a in alphas] == [id(c.alpha) for c in searched_layers(model).values()]
    trained = [
        name for name, p in model.named_parameters() if p.requires_grad and ".alpha" not in name
    ]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(alphas, lr=0.01)
    with alpha_training(model):
        assert [p.requires_grad for p in alphas] == [True] * len(alphas)
        assert sum(p.requires_grad for p in model.parameters()) == len(alphas)
        model(image(batch=2)).square().mean().backward()
        optimizer.step()
    assert all(p.grad is None for name, p in model.named_parameters() if ".alpha" not in name)
    changed = [
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert len(changed) == len(alphas) and all(name.endswith(".alpha") for name in changed)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained

    with pytest.raises(ZeroDivisionError), alpha_training(model):
        model(image(batch=2))
        1 / 0
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert torch.equal(model.bn1.running_mean, before["bn1.running_mean"])


def test_alpha_on_which_no_loss_depends_is_named():
    model = to_supernet(resnet(BasicBlock), SPACE)
    with pytest.warns(UserWarning, match="did not depend on res3.* res5.0.conv2: α"):
        with alpha_training(model):
            model.layer3(torch.rand(1, 128, 8, 8)).square().mean().backward()


def test_nothing_to_train_or_decode():
    plain = resnet(BasicBlock)
    with pytest.raises(NATSError, match="no conv is searched: call to_supernet first"):
        alpha_parameters(plain)
    with pytest.raises(NATSError, match="no conv is searched"):
        Architecture.decode(plain)


def test_frozen_state_dict_wants_the_voted_order():
    model = to_supernet(resnet(BasicBlock), SPACE)
    with pytest.raises(NATSError, match="only an architecture in voted order"):
        frozen_state_dict(model, Architecture.decode(model))


def test_frozen_state_dict_of_an_architecture_that_was_never_decoded():
    """One dilation everywhere, say: a channel's row is its dilation's replica."""
    model = to_supernet(resnet(BasicBlock), SearchSpace([[[1, 1], [1, 3]]] * 3, num_groups=4))
    convs = searched_layers(model)
    for conv in convs.values():
        nn.init.normal_(conv.replicas)

    def everywhere(h, w):
        return Architecture({name: [(conv.out_channels, h, w)] for name, conv in convs.items()})

    for h, w in next(iter(convs.values())).genotypes:
        weights = frozen_state_dict(model, everywhere(h, w))
        for name, module in model.named_modules():
            if module in convs.values():
                replica = module.genotype_weights()[module.genotypes.index((h, w))]
                assert torch.equal(weights[f"{name}.weight"], replica)
    for wrong in (everywhere(9, 9), Architecture({name: [(1, 1, 1)] for name in convs})):
        with pytest.raises(NATSError, match="the architecture has .*, the super-network .* ch"):
            frozen_state_dict(model, wrong)


def test_frozen_state_dict_keeps_what_others_call_alpha():
    model = resnet(BasicBlock)
    model.fc.alpha = nn.Parameter(torch.ones(1))
    to_supernet(model, SPACE)
    frozen = frozen_state_dict(model, Architecture.decode(model, "voted"))
    assert "fc.alpha" in frozen
    assert [name for name in frozen if name.endswith((".alpha", ".replicas"))] == ["fc.alpha"]
