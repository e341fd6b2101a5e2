import copy

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from oracles import (
    BACKBONES,
    GENOTYPES,
    RUNNABLE,
    assert_identical,
    build_plain,
    case_cfg,
    has_dilations,
    image,
    lazy_backbone,
    make_one_hot,
    outputs_and_gradients,
    random_architecture,
    space_of,
    tiny_cfg,
)
from torch import nn

from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.export.torchscript_patch import patch_nonscriptable_classes
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from detectron2_nats import (
    Architecture,
    MixedDilationConv2d,
    NATSError,
    SearchSpace,
    apply_architecture,
    to_supernet,
)
from detectron2_nats.method.convs import searched_layers
from detectron2_nats.method.decode import DECODE_ORDERS
from detectron2_nats.method.stages import conv3x3_layers

BLOCKS = {
    "R18": {"res3": 2, "res4": 2, "res5": 2},
    "R34": {"res3": 4, "res4": 6},
    "R50": {"res3": 4, "res4": 6, "res5": 3},
    "R101": {"res3": 4, "res4": 23, "res5": 3},
    "R152": {"res3": 8, "res4": 36, "res5": 3},
    "ResNeXt": {"res3": 4, "res4": 6, "res5": 3},
    "FPN": {"res3": 4, "res4": 6, "res5": 3},
    "RetinaNet": {"res3": 4, "res4": 6, "res5": 3},
    "C4": {"res3": 4, "res4": 6},
    "DC5": {"res3": 4, "res4": 6, "res5": 3},
    "Deformable": {"res3": 4, "res4": 6},
    "Lazy": {"res3": 2, "res4": 2, "res5": 2},
}


def expected_layers(name):
    attributes = ["conv1", "conv2"] if name in ("R18", "R34") else ["conv2"]
    return [
        f"{stage}.{block}.{attribute}"
        for stage, blocks in BLOCKS[name].items()
        for block in range(blocks)
        for attribute in attributes
    ]


def fingerprint(module):
    """Every submodule and tensor, by identity, and every training flag."""
    modules = [(name, id(child), child.training) for name, child in module.named_modules()]
    tensors = {name: id(p) for name, p in module.named_parameters()}
    return modules, tensors, {k: v.clone() for k, v in module.state_dict().items()}


def assert_untouched(module, before):
    after = fingerprint(module)
    assert after[:2] == before[:2]
    assert_identical(after[2], before[2])


# -- every supported backbone ---------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_every_3x3_conv_of_the_stages_is_searched(name):
    backbone = build_plain(name)
    convs = conv3x3_layers(backbone)
    assert to_supernet(backbone, space_of(name)) is backbone
    found = searched_layers(backbone)
    assert list(found) == expected_layers(name)
    swapped = [m for m in backbone.modules() if isinstance(m, MixedDilationConv2d)]
    assert {id(m) for m in swapped} == {id(m) for m in found.values()}
    for layer, conv in found.items():
        genotypes = tuple(map(tuple, GENOTYPES[layer.split(".")[0]]))
        assert conv.genotypes == genotypes and conv.alpha.shape == (4, len(genotypes))
        assert conv.weight is convs[layer].weight and conv.norm is convs[layer].norm


@pytest.mark.parametrize("name", RUNNABLE)
def test_zero_alpha_gives_the_plain_backbone(name):
    """Invariant 1, forward and backward, with norms in training mode."""
    plain = build_plain(name).train()
    supernet = to_supernet(copy.deepcopy(plain), space_of(name))
    for order in DECODE_ORDERS:
        decoded = Architecture.decode(searched_layers(supernet), order)
        convs = conv3x3_layers(plain)
        assert decoded.layers == {
            k: ((convs[k].out_channels, 1, 1),) for k in expected_layers(name)
        }
    frozen = apply_architecture(copy.deepcopy(plain), decoded)
    for expected, actual in zip(
        outputs_and_gradients(plain, image()), outputs_and_gradients(frozen, image())
    ):
        assert_identical(actual, expected)
    assert_identical(frozen.state_dict(), plain.state_dict())  # norm statistics have moved alike


@pytest.mark.parametrize("name", BACKBONES)
def test_frozen_has_the_keys_parameters_and_flops_of_plain(name):
    """Invariant 2."""
    plain = build_plain(name)
    architecture = random_architecture(name, plain)
    frozen = apply_architecture(copy.deepcopy(plain), architecture)
    assert_identical(frozen.state_dict(), plain.state_dict())
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = getattr(frozen, kind)(), getattr(plain, kind)()
        shapes = [(k, t.shape, t.requires_grad) for k, t in theirs]
        assert [(k, t.shape, t.requires_grad) for k, t in ours] == shapes
    changed = [m for m in frozen.modules() if has_dilations(m)]
    assert len(changed) == len(expected_layers(name))
    if name in RUNNABLE:
        counts = []
        for model in (plain, frozen):
            flops = FlopCountAnalysis(model, image()).unsupported_ops_warnings(False)
            counts.append((flops.by_module_and_operator(), flops.total()))
        assert counts[0] == counts[1] and counts[0][1] > 0
        outputs = [m(image()) for m in (plain, frozen)]
        last = list(outputs[0])[-1]
        assert not torch.equal(outputs[0][last], outputs[1][last]), "the dilations do count"


@pytest.mark.parametrize("name", RUNNABLE)
def test_one_hot_super_network_is_the_frozen_network(name):
    """Invariant 4: voted order, the same weights, float64."""
    plain = build_plain(name).double()
    supernet = to_supernet(copy.deepcopy(plain), space_of(name))
    votes = make_one_hot(supernet)
    architecture = Architecture.decode(searched_layers(supernet), "voted", seed=3)
    assert architecture.search == {"seed": 3, "order": "voted"}
    for layer, conv in searched_layers(supernet).items():
        chosen = [conv.genotypes[g] for g in votes[layer] for _ in range(conv.out_channels // 4)]
        runs = architecture.layers[layer]
        assert [(d_h, d_w) for count, d_h, d_w in runs for _ in range(count)] == chosen
    frozen = apply_architecture(plain, architecture)
    x = image(dtype=torch.float64)
    expected = frozen(x)
    for alpha_trains in (True, False):
        for conv in searched_layers(supernet).values():
            conv.alpha.requires_grad_(alpha_trains)
        actual = supernet(x)
        assert list(actual) == list(expected)
        for key in expected:
            torch.testing.assert_close(actual[key], expected[key], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", RUNNABLE)
def test_whole_convs_of_one_dilation_are_detectron2s_own(name):
    """Detectron2's own conv with its dilation set is the oracle, bit for bit."""
    plain = build_plain(name)
    layers = {}
    oracle = copy.deepcopy(plain)
    for index, (layer, conv) in enumerate(conv3x3_layers(oracle).items()):
        if layer in expected_layers(name):
            d_h, d_w = [(1, 1), (2, 1), (1, 3), (2, 2)][index % 4]
            layers[layer] = [[conv.out_channels, d_h, d_w]]
            conv.dilation = conv.padding = conv.dilation[0] * d_h, conv.dilation[1] * d_w
    frozen = apply_architecture(plain, Architecture(layers))
    with torch.no_grad():
        assert_identical(frozen(image()), oracle(image()))


@pytest.mark.parametrize("name", sorted(set(RUNNABLE) - {"R34", "R101", "R152"}))
def test_script_and_trace(name):
    plain = build_plain(name)
    frozen = apply_architecture(plain, random_architecture(name, plain)).eval()
    patch_nonscriptable_classes()  # Detectron2's own preparation of ResNet and FPN

    class Tuple(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = frozen

        def forward(self, x):
            return tuple(self.backbone(x).values())

    with torch.no_grad():
        expected = frozen(image())
        traced = torch.jit.trace(Tuple(), image(), check_trace=False)
        assert_identical(dict(zip(expected, traced(image()))), expected)
        if name != "Lazy":  # Detectron2's ResNet keeps OmegaConf's list, which cannot be scripted
            assert_identical(torch.jit.script(frozen)(image()), expected)


# -- kinds of space -------------------------------------------------------------------------


def test_no_copy_is_made_with_shared_weights():
    plain = build_plain("R50")
    count = sum(p.numel() for p in plain.parameters())
    shared = to_supernet(copy.deepcopy(plain), space_of("R50", share_weights=True))
    own = to_supernet(copy.deepcopy(plain), space_of("R50"))
    alphas = sum(c.alpha.numel() for c in searched_layers(own).values())
    replicas = sum((len(c.genotypes) - 1) * c.weight.numel() for c in searched_layers(own).values())
    assert sum(p.numel() for p in shared.parameters()) == count + alphas
    assert sum(p.numel() for p in own.parameters()) == count + alphas + replicas
    assert_shared_equals_own(shared, own)


def assert_shared_equals_own(shared, own):
    """As long as the replicas are copies, there is no difference."""
    for network in (shared, own):
        make_one_hot(network)
        for conv in searched_layers(network).values():
            conv.alpha.data.mul_(1e-4)
    with torch.no_grad():
        assert_identical(shared(image()), own(image()))


def test_the_papers_sets_and_groups():
    supernet = to_supernet(build_plain("R50"), SearchSpace("C"))
    shapes = {tuple(c.alpha.shape) for k, c in searched_layers(supernet).items() if "res5" not in k}
    assert shapes == {(16, 5)}
    assert searched_layers(supernet)["res5.2.conv2"].alpha.shape == (16, 9)


def test_path_level():
    supernet = to_supernet(build_plain("ResNeXt"), space_of("ResNeXt", num_groups=1))
    make_one_hot(supernet)
    for order in DECODE_ORDERS:
        decoded = Architecture.decode(searched_layers(supernet), order)
        assert all(len(runs) == 1 for runs in decoded.layers.values())


def test_channels_per_group():
    space = space_of("R50", num_groups=None, channels_per_group=16)
    supernet = to_supernet(build_plain("R50"), space)
    groups = {k.split(".")[0]: c.num_groups for k, c in searched_layers(supernet).items()}
    assert groups == {"res3": 2, "res4": 4, "res5": 8}  # of 32, 64 and 128 channels


@pytest.mark.parametrize("order", DECODE_ORDERS)
def test_resnext_groups_are_whole_conv_groups(order):
    plain = build_plain("ResNeXt")
    supernet = to_supernet(copy.deepcopy(plain), space_of("ResNeXt", num_groups=8))
    make_one_hot(supernet)
    decoded = Architecture.decode(searched_layers(supernet), order)
    frozen = apply_architecture(plain, decoded)  # refuses a cut conv group
    assert any(
        len(conv.segments) > 2
        for conv in conv3x3_layers(frozen).values()
        if hasattr(conv, "segments")
    )


def test_order_of_stages_is_the_spaces():
    space = SearchSpace([[[1, 1], [5, 5]], [[1, 1], [3, 3]]], stages=["res5", "res3"])
    found = searched_layers(to_supernet(build_plain("R50"), space))
    assert {k.split(".")[0] for k in found} == {"res3", "res5"}
    assert found["res5.0.conv2"].genotypes == ((1, 1), (5, 5))
    assert found["res3.0.conv2"].genotypes == ((1, 1), (3, 3))


def test_res2_can_be_searched_where_it_trains():
    cfg = tiny_cfg(model_options=["BACKBONE.FREEZE_AT", 1])
    supernet = to_supernet(build_backbone(cfg), SearchSpace(stages=["res2"]))
    assert list(searched_layers(supernet)) == [f"res2.{i}.conv2" for i in range(3)]


# -- what is left alone ---------------------------------------------------------------------


def test_deformable_convs_are_left_alone():
    plain = build_plain("Deformable")
    for changed in (
        to_supernet(copy.deepcopy(plain), space_of("Deformable")),
        apply_architecture(copy.deepcopy(plain), random_architecture("Deformable", plain)),
    ):
        for block, before in zip(changed.res5, plain.res5):
            assert not isinstance(block.conv2, nn.Conv2d)
            assert type(block.conv2) is type(before.conv2)
            assert type(block.conv2_offset) is type(before.conv2_offset)
    with pytest.raises(NATSError, match="stage res5 has no plain 3x3 conv .*deformable"):
        to_supernet(plain, SearchSpace(stages=["res3", "res5"]))
    with pytest.raises(NATSError, match="backbone lacks res5.0.conv2"):
        apply_architecture(plain, Architecture({"res5.0.conv2": [[128, 3, 3]]}))


def test_untouched_stages_stay_plain():
    plain = build_plain("R50")
    before = conv3x3_layers(plain)
    layers = random_architecture("R50", plain).restrict(["res4"])
    apply_architecture(plain, layers)
    for layer, conv in conv3x3_layers(plain).items():
        assert has_dilations(conv) == layer.startswith("res4")
        assert conv is before[layer] or layer.startswith("res4")


def test_deepcopy_of_a_super_network():
    supernet = to_supernet(build_plain("FPN"), space_of("FPN"))
    make_one_hot(supernet)
    twin = copy.deepcopy(supernet)
    assert_identical(twin.state_dict(), supernet.state_dict())
    assert_identical(twin(image()), supernet(image()))
    for conv in searched_layers(twin).values():
        conv.alpha.data.zero_()
    assert all(conv.alpha.all() for conv in searched_layers(supernet).values())


def test_freezing_afterwards():
    plain = build_backbone(tiny_cfg(model_options=["RESNETS.NORM", "BN"]))
    frozen = apply_architecture(plain, random_architecture("C4", plain))
    frozen.freeze(4)
    assert not any(p.requires_grad for p in frozen.res3.parameters())
    assert all(isinstance(block.conv2.norm, FrozenBatchNorm2d) for block in frozen.res3)


@pytest.mark.parametrize("name", ["R50", "FPN", "ResNeXt"])
def test_empty_batch(name):
    plain = build_plain(name)
    supernet = to_supernet(copy.deepcopy(plain), space_of(name))
    frozen = apply_architecture(copy.deepcopy(plain), random_architecture(name, plain))
    expected = {k: y.shape for k, y in plain(image(batch=0)).items()}
    for network in (supernet, frozen):
        assert {k: y.shape for k, y in network(image(batch=0)).items()} == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    plain = build_plain("R50")
    supernet = to_supernet(copy.deepcopy(plain), space_of("R50"))
    frozen = apply_architecture(copy.deepcopy(plain), random_architecture("R50", plain))
    with torch.autocast("cpu", dtype=dtype):
        expected = plain(image())["res5"].dtype
        assert supernet(image())["res5"].dtype == frozen(image())["res5"].dtype == expected
        assert expected == dtype


# -- whole detectors and LazyConfig ---------------------------------------------------------


def test_architecture_file_on_a_lazy_model(tmp_path):
    plain = build_plain("Lazy")
    path = str(tmp_path / "architecture.yaml")
    random_architecture("Lazy", plain).save(path)
    model = instantiate(L(apply_architecture)(backbone=lazy_backbone(), architecture=path))
    model.load_state_dict(plain.state_dict())
    expected = apply_architecture(plain, path)
    assert_identical(model.eval()(image()), expected(image()))


def test_super_network_of_a_lazy_model():
    space = L(SearchSpace)(space=[[[1, 1], [3, 1]]], stages=["res4"], num_groups=2)
    model = instantiate(L(to_supernet)(backbone=lazy_backbone(), space=space))
    assert [c.genotypes for c in searched_layers(model).values()] == [((1, 1), (3, 1))] * 2


def test_whole_c4_detector_with_res5_in_its_heads():
    cfg = tiny_cfg(
        model_options=["ROI_HEADS.NAME", "Res5ROIHeads", "RESNETS.OUT_FEATURES", ["res4"]]
    )
    detector = build_model(cfg)
    architecture = Architecture({f"res5.{i}.conv2": [[64, 1, 1], [64, 2, 2]] for i in range(3)})
    assert apply_architecture(detector, architecture) is detector
    assert all(has_dilations(b.conv2) for b in detector.roi_heads.res5)


# -- errors: they name the thing and the cure, and change nothing ---------------------------


def fails_untouched(transform, module, message):
    before = fingerprint(module)
    with pytest.raises(NATSError, match=message) as caught:
        transform(module)
    assert "\n" not in str(caught.value)
    assert_untouched(module, before)


@pytest.mark.parametrize(
    "space, message",
    [
        (
            dict(num_groups=48),
            "NUM_GROUPS 48 does not divide the 32 channels of res3.0.conv2: choose a divisor of 32",
        ),
        # fits res3 and res4, not res5: nothing may have been changed by then
        (dict(stages=["res4", "res3", "res5"], num_groups=64), "the 32 channels of res3.0.conv2"),
        (
            dict(channels_per_group=64),
            "CHANNELS_PER_GROUP 64 does not divide the 32 channels of res3.0.conv2",
        ),
        (
            dict(stages=["res3", "res2"]),
            r"stage res2 is frozen \(res2.0.conv2 takes no gradient\): lower "
            "MODEL.BACKBONE.FREEZE_AT or take res2 out of MODEL.NATS.STAGES",
        ),
    ],
)
def test_space_that_does_not_fit(space, message):
    fails_untouched(lambda b: to_supernet(b, SearchSpace(**space)), build_plain("R50"), message)


def test_missing_stage():
    message = "stage res5 is missing: this backbone builds res2, res3, res4; take res5 out of"
    fails_untouched(lambda b: to_supernet(b, SearchSpace()), build_plain("C4"), message)


def test_stage_frozen_by_freeze_at():
    cfg = case_cfg("R50")
    cfg.MODEL.BACKBONE.FREEZE_AT = 4
    backbone = build_backbone(cfg)
    fails_untouched(lambda b: to_supernet(b, SearchSpace()), backbone, "stage res3 is frozen")
    to_supernet(backbone, SearchSpace(stages=["res5"]))


def test_groups_that_cut_a_conv_group():
    message = "NUM_GROUPS 16 cuts the conv groups of res3.0.conv2: it has 8 conv groups of"
    fails_untouched(lambda b: to_supernet(b, SearchSpace()), build_plain("ResNeXt"), message)


def test_conv_of_another_kind_in_the_last_stage():
    backbone = build_plain("R50").train()
    backbone.res5[2].conv2.padding = (0, 0)
    message = r"kernel \(3, 3\), padding \(0, 0\) of zeros, not \(1, 1\) of zeros"
    fails_untouched(lambda b: to_supernet(b, SearchSpace()), backbone, message)
    architecture = random_architecture("R50", backbone)
    message = f"the architecture does not fit res5.2.conv2: {message}"
    fails_untouched(lambda b: apply_architecture(b, architecture), backbone, message)


def test_no_residual_stages():
    for transform in (
        lambda b: to_supernet(b, SearchSpace()),
        lambda b: apply_architecture(b, Architecture({"res3.0.conv2": [[8, 1, 1]]})),
    ):
        message = r"Sequential has no residual stages \(res2 to res5.*: choose a ResNet"
        fails_untouched(transform, nn.Sequential(nn.Conv2d(3, 8, 3)), message)


def test_two_residual_networks():
    two = nn.ModuleDict({"left": build_plain("R50"), "right": build_plain("R50")})
    message = "found two stages res2, the second at right.res2: pass one residual network"
    fails_untouched(lambda b: to_supernet(b, SearchSpace()), two, message)


def test_applying_twice():
    plain = build_plain("R50")
    architecture = random_architecture("R50", plain)
    frozen = apply_architecture(copy.deepcopy(plain), architecture)
    supernet = to_supernet(copy.deepcopy(plain), space_of("R50"))
    for network, kind in ((frozen, "GroupedDilationConv2d"), (supernet, "MixedDilationConv2d")):
        message = f"res3.0.conv2 is a {kind} already: start from the plain backbone"
        fails_untouched(lambda b: apply_architecture(b, architecture), network, message)
        fails_untouched(lambda b: to_supernet(b, space_of("R50")), network, message)


def test_architecture_of_another_backbone():
    layers = dict(random_architecture("R50", build_plain("R50")).layers)

    def changed(add=None, remove=()):
        kept = {k: v for k, v in layers.items() if k not in remove}
        return Architecture({**kept, **(add or {})})

    plain = build_plain("R50")
    for architecture, message in (
        (
            changed({"res3.4.conv2": [[32, 1, 1]], "res9.0.conv2": [[8, 1, 1]]}),
            "the architecture does not fit: the backbone lacks res3.4.conv2, res9.0.conv2. It must",
        ),
        (changed({"res4.0.conv1": [[64, 1, 1]]}), "the backbone lacks res4.0.conv1. It must"),
        (
            changed(remove=["res3.1.conv2", "res5.2.conv2"]),
            "the architecture does not name res3.1.conv2, res5.2.conv2. It must name every",
        ),
        (
            changed({"res2.0.conv2": [[16, 1, 1]]}, remove=["res5.0.conv2"]),
            "the architecture does not name res2.1.conv2, res2.2.conv2, res5.0.conv2. It must",
        ),
        (
            Architecture({f"res4.{i}.conv2": [[64, 1, 1]] for i in range(23)}),
            "lacks res4.6.conv2, .*res4.10.conv2 and 12 more. It must",
        ),
        (
            changed({"res5.2.conv2": [[64, 1, 1], [32, 3, 3]]}),
            "does not fit res5.2.conv2: segments of 96 channels do not fit 128 channels",
        ),
    ):
        fails_untouched(lambda b: apply_architecture(b, architecture), plain, message)


def test_architecture_that_cuts_a_conv_group():
    plain = build_plain("ResNeXt")
    layers = dict(random_architecture("ResNeXt", plain).layers)
    layers["res5.2.conv2"] = [[2, 1, 1], [254, 3, 3]]
    message = "does not fit res5.2.conv2: segments .* cut conv groups of 32 channels"
    fails_untouched(lambda b: apply_architecture(b, Architecture(layers)), plain, message)


def test_architecture_file_that_is_missing():
    message = "^missing.yaml: cannot be read"
    fails_untouched(lambda b: apply_architecture(b, "missing.yaml"), build_plain("C4"), message)
