"""Residual networks that Detectron2 did not build: torchvision's, timm's, mmdet's."""

import copy

import pytest
import torch
import torchvision
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
from torch.nn.utils import parametrizations
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, Bottleneck

from detectron2_nats import (
    Architecture,
    NATSError,
    SearchSpace,
    alpha_parameters,
    alpha_training,
    apply_architecture,
    frozen_state_dict,
    to_supernet,
)
from detectron2_nats.method.names import named_convs, residual_stages, searched_layers


def resnet(block=Bottleneck, **kwargs):
    """Of torchvision; shallow and narrow."""
    if block is Bottleneck:
        kwargs.setdefault("width_per_group", 16)
    return torchvision.models.ResNet(block, [1, 2, 1, 1], num_classes=4, **kwargs)


def resnet_fpn():
    """As in torchvision's detectors."""
    layers = {f"layer{i}": str(i) for i in range(1, 5)}
    return BackboneWithFPN(resnet(), layers, [256, 512, 1024, 2048], 16)


class ResLayer(nn.Sequential):
    """As mmdet's, a subclass of nn.Sequential."""


def mmdet():
    network = resnet()
    for name in ("layer1", "layer2", "layer3", "layer4"):
        setattr(network, name, ResLayer(*getattr(network, name)))
    return network


def timm_model(name, **kwargs):
    return pytest.importorskip("timm").create_model(name, pretrained=False, **kwargs)


def timm_resnet(name, **kwargs):
    return timm_model(name, layers=(1, 2, 1, 1), **kwargs)


MODELS = {
    "torchvision, basic blocks": lambda: resnet(BasicBlock),
    "torchvision, bottlenecks": resnet,
    "torchvision, ResNeXt": lambda: resnet(groups=8, width_per_group=4),
    "torchvision, DC5": lambda: resnet(replace_stride_with_dilation=[False, False, True]),
    "torchvision, FPN": resnet_fpn,
    "mmdet": mmdet,
    "timm, basic blocks": lambda: timm_resnet("resnet18"),
    "timm, features": lambda: timm_resnet("resnet50", features_only=True, base_width=16),
    "timm, deep stem": lambda: timm_resnet("resnet50d", base_width=16),
    "timm, ResNeXt": lambda: timm_resnet("resnext50_32x4d"),
    "timm, SE": lambda: timm_resnet("seresnet50", base_width=16),
    "timm, another SE": lambda: timm_model("legacy_seresnet18"),
    "timm, anti-aliased": lambda: timm_resnet("resnetaa50", base_width=16),
    "timm, anti-aliased basic blocks": lambda: timm_resnet("resnetblur18"),
    "timm, stride 16": lambda: timm_resnet(
        "resnet50", features_only=True, output_stride=16, base_width=16
    ),
}

SPACE = SearchSpace([[[1, 1], [1, 3]], [[1, 1], [3, 1]], [[1, 1], [2, 2]]], num_groups=4)


def built(name):
    torch.manual_seed(0)
    return randomized(MODELS[name]()).eval()


def outputs(model, x):
    with torch.no_grad():
        y = model(x)
    if isinstance(y, dict):
        return {str(key): value for key, value in y.items()}
    return dict(enumerate(y if isinstance(y, (list, tuple)) else [y]))


def plain_architecture(model):
    convs = residual_convs(model)
    return Architecture({k: [[c.out_channels, 1, 1]] for k, c in convs.items()})


# -- what is taken --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_kind(name):
    """Names, keys, the plain network bit for bit, and the super-network that becomes frozen."""
    plain = built(name)
    expected = outputs(plain, image(batch=2))
    layers = list(residual_convs(plain))
    convs = ("conv1", "conv2") if "res3.0.conv1" in layers else ("conv2",)
    assert layers == [
        f"{stage}.{block}.{conv}"
        for stage, path in residual_stages(plain).items()
        for block in range(len(plain.get_submodule(path)))
        for conv in convs
    ]
    same = apply_architecture(copy.deepcopy(plain), plain_architecture(plain))
    assert_identical(outputs(same, image(batch=2)), expected)
    assert_identical(same.state_dict(), plain.state_dict())

    supernet = to_supernet(copy.deepcopy(plain), SPACE)
    make_one_hot(supernet)
    for index, conv in enumerate(searched_layers(supernet).values()):
        conv.replicas.data.mul_(0.5 + 0.1 * index)  # or nobody would notice whose they are
    architecture = Architecture.decode(supernet, "voted")
    weights = frozen_state_dict(supernet, architecture)
    assert list(weights) == list(plain.state_dict())
    frozen = apply_architecture(copy.deepcopy(plain), architecture)
    frozen.load_state_dict(weights)
    found = outputs(frozen, image(batch=2))
    wanted = outputs(supernet, image(batch=2))
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)


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


def test_strides_stay_where_the_block_has_them():
    frozen = resnet()
    apply_architecture(frozen, plain_architecture(frozen))
    assert frozen.layer2[0].conv2.stride == (2, 2)
    aliased = timm_resnet("resnetaa50")
    apply_architecture(aliased, plain_architecture(aliased))
    assert aliased.layer2[0].conv2.stride == (1, 1)


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


def test_a_path_that_is_another_convs_name_is_refused():
    block = nn.ModuleDict({"conv2": nn.Conv2d(8, 8, 3, padding=1)})
    network = nn.ModuleDict({"body": resnet(BasicBlock), "res3": nn.ModuleList([block])})
    message = "two convs have the name res3.0.conv2, at body.layer2.0.conv2 and res3.0.conv2"
    with pytest.raises(NATSError, match=message):
        named_convs(network)


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


# -- what is not ----------------------------------------------------------------------------


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def test_convs_that_are_more_than_a_conv_are_named():
    """To replace one by ours would silently change what the network computes."""
    network = resnet(BasicBlock)
    for block in network.layer3:
        block.conv1 = Standardised(block.conv1.in_channels, 256, 3, padding=1)
        block.conv2 = parametrizations.weight_norm(block.conv2)
    message = r"'res4.\*' matches no conv .*: res4.0.conv1: Standardised; res4.0.conv2: its weight"
    with pytest.raises(NATSError, match=message):
        to_supernet(network, SPACE)
    message = r"does not fit: res4.0.conv1: Standardised"
    with pytest.raises(NATSError, match=message):
        apply_architecture(network, Architecture({"res4.0.conv1": [[256, 1, 3]]}))


@pytest.mark.parametrize(
    "name, message",
    [
        ("res2net50_14w_8s", r"near are layer3.\*.convs.\*"),
        ("resnetv2_50", r"near are .*stages.\*.blocks.\*.conv2"),
        ("hrnet_w18", r"near are res2.\*.conv2"),
    ],
)
def test_other_networks_of_timm_are_named(name, message):
    with pytest.raises(NATSError, match=rf"CONVS 'res3.\*' matches no conv .*{message}"):
        to_supernet(timm_model(name), SPACE)


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


# -- α --------------------------------------------------------------------------------------


def test_alpha_training_changes_alpha_alone():
    model = to_supernet(randomized(resnet(BasicBlock)).train(), SPACE)
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
