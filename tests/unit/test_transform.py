"""Backbones of every supported kind: plain → super-network, plain → frozen network."""

import copy
import logging

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from oracles import (
    BACKBONES,
    GENOTYPES,
    RUNNABLE,
    assert_identical,
    build_plain,
    has_dilations,
    image,
    lazy_backbone,
    make_one_hot,
    outputs_and_gradients,
    random_architecture,
    residual_convs,
    space_of,
    tiny_cfg,
)
from torch import nn

from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling import build_backbone, build_model
from detectron2_nats import (
    Architecture,
    MixedDilationConv2d,
    NATSError,
    SearchSpace,
    apply_architecture,
    to_supernet,
)
from detectron2_nats.method.decode import DECODE_ORDERS
from detectron2_nats.method.names import searched_layers

BLOCKS = {
    "R18": {"res3": 2, "res4": 2, "res5": 2},
    "C4": {"res3": 4, "res4": 6},
    "Deformable": {"res3": 4, "res4": 6},
    "Lazy": {"res3": 2, "res4": 2, "res5": 2},
}
R50 = {"res3": 4, "res4": 6, "res5": 3}


def expected_layers(name):
    attributes = ["conv1", "conv2"] if name == "R18" else ["conv2"]
    return [
        f"{stage}.{block}.{attribute}"
        for stage, blocks in BLOCKS.get(name, R50).items()
        for block in range(blocks)
        for attribute in attributes
    ]


# -- every supported backbone ---------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_every_3x3_conv_of_the_stages_is_searched(name):
    backbone = build_plain(name)
    convs = residual_convs(backbone)
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
        decoded = Architecture.decode(supernet, order)
        convs = residual_convs(plain)
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
        outputs = [m(image()) for m in (plain, frozen)]
        last = list(outputs[0])[-1]
        assert not torch.equal(outputs[0][last], outputs[1][last]), "the dilations do count"
    if name in ("R18", "ResNeXt", "DC5"):
        flops = [
            FlopCountAnalysis(m, image()).unsupported_ops_warnings(False) for m in (plain, frozen)
        ]
        assert flops[0].by_module_and_operator() == flops[1].by_module_and_operator()
        assert flops[0].total() == flops[1].total() > 0


@pytest.mark.parametrize("name", RUNNABLE)
def test_one_hot_super_network_is_the_frozen_network(name):
    """Invariant 4: voted order, the same weights, float64."""
    plain = build_plain(name).double()
    supernet = to_supernet(copy.deepcopy(plain), space_of(name))
    votes = make_one_hot(supernet)
    architecture = Architecture.decode(supernet, "voted", seed=3)
    assert architecture.search == {"seed": 3, "order": "voted"}
    for layer, conv in searched_layers(supernet).items():
        voted = [conv.genotypes[g] for g in votes[layer] for _ in range(conv.out_channels // 4)]
        segments = architecture.layers[layer]
        assert [(d_h, d_w) for count, d_h, d_w in segments for _ in range(count)] == voted
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
    for index, (layer, conv) in enumerate(residual_convs(oracle).items()):
        if layer in expected_layers(name):
            d_h, d_w = [(1, 1), (2, 1), (1, 3), (2, 2)][index % 4]
            layers[layer] = [[conv.out_channels, d_h, d_w]]
            conv.dilation = conv.padding = conv.dilation[0] * d_h, conv.dilation[1] * d_w
    frozen = apply_architecture(plain, Architecture(layers))
    with torch.no_grad():
        assert_identical(frozen(image()), oracle(image()))


# -- kinds of space -------------------------------------------------------------------------


def test_the_papers_sets_and_groups():
    convs = searched_layers(to_supernet(build_plain("R50"), SearchSpace("C")))
    shapes = {tuple(c.alpha.shape) for k, c in convs.items() if "res5" not in k}
    assert shapes == {(16, 5)} and convs["res5.2.conv2"].alpha.shape == (16, 9)
    space = space_of("R50", num_groups=None, channels_per_group=16)
    convs = searched_layers(to_supernet(build_plain("R50"), space))
    groups = {k.split(".")[0]: c.num_groups for k, c in convs.items()}
    assert groups == {"res3": 2, "res4": 4, "res5": 8}  # of 32, 64 and 128 channels


def test_each_pattern_has_its_genotypes_and_a_conv_the_first_that_it_matches():
    space = SearchSpace(
        [[[1, 1], [5, 5]], [[1, 1], [2, 2]], [[1, 1], [3, 3]]], ["res5.*", "res3.0.*", "res3.*"]
    )
    found = searched_layers(to_supernet(build_plain("R50"), space))
    assert {k.split(".")[0] for k in found} == {"res3", "res5"}
    assert found["res5.0.conv2"].genotypes == ((1, 1), (5, 5))
    assert found["res3.0.conv2"].genotypes == ((1, 1), (2, 2))
    assert found["res3.1.conv2"].genotypes == ((1, 1), (3, 3))


def test_the_rest_of_a_stage_that_is_searched_in_part_decodes_to_plain():
    plain = build_plain("FPN")
    supernet = to_supernet(copy.deepcopy(plain), SearchSpace("A", ["res4.[01].*", "fpn_output3"]))
    make_one_hot(supernet)
    architecture = Architecture.decode(supernet, "voted")
    searched = ["res4.0.conv2", "res4.1.conv2", "fpn_output3"]
    assert sorted(architecture.layers) == sorted(
        [*searched, *(f"res4.{i}.conv2" for i in range(2, 6))]
    )
    for name, segments in architecture.layers.items():
        assert (segments == ((64, 1, 1),)) == (name not in searched)
    frozen = apply_architecture(plain, architecture)
    torch.testing.assert_close(frozen(image())["p5"], supernet(image())["p5"])


# -- what is left alone ---------------------------------------------------------------------


@pytest.fixture
def warned(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detectron2_nats"), "parent", logging.getLogger())
    return lambda: [r.getMessage() for r in caplog.records]


def test_deformable_convs_are_left_alone(warned):
    plain = build_plain("Deformable")
    for changed in (
        to_supernet(copy.deepcopy(plain), SearchSpace("A", ["*"], num_groups=4)),
        apply_architecture(copy.deepcopy(plain), random_architecture("Deformable", plain)),
    ):
        for block, before in zip(changed.res5, plain.res5):
            assert not isinstance(block.conv2, nn.Conv2d)
            assert type(block.conv2) is type(before.conv2)
            assert type(block.conv2_offset) is type(before.conv2_offset)
    assert "res5.0.conv2 (StandInDeformConv)" in warned()[0]
    assert "res5.0.conv2_offset (it lies beside the main path" in warned()[0]
    with pytest.raises(NATSError, match="'res5.*' matches no conv .* res5.0.conv2: Stand"):
        to_supernet(plain, SearchSpace("A", ["res3.*", "res5.*"]))
    with pytest.raises(NATSError, match="does not fit: res5.0.conv2: StandInDeformConv"):
        apply_architecture(plain, Architecture({"res5.0.conv2": [[128, 3, 3]]}))


def test_frozen_stages_and_other_paddings_are_left_alone_and_named(warned):
    backbone = build_plain("R50")  # FREEZE_AT 2
    backbone.res5[2].conv2.padding = (0, 0)
    to_supernet(backbone, SearchSpace("A", ["res*"]))
    assert {name[:4] for name in searched_layers(backbone)} == {"res3", "res4", "res5"}
    (line,) = warned()
    assert "res2.0.conv2 (it is frozen (takes no gradient))" in line
    assert "res5.2.conv2 (kernel (3, 3), padding (0, 0) of zeros, not (1, 1) of zeros)" in line
    trained = build_backbone(tiny_cfg(model_options=["BACKBONE.FREEZE_AT", 1]))
    found = searched_layers(to_supernet(trained, SearchSpace(convs=["res2.*"])))
    assert list(found) == [f"res2.{i}.conv2" for i in range(3)]


# -- whole detectors and LazyConfig ---------------------------------------------------------


def test_architecture_file_on_a_lazy_model(tmp_path):
    plain = build_plain("Lazy")
    path = str(tmp_path / "architecture.yaml")
    random_architecture("Lazy", plain).save(path)
    model = instantiate(L(apply_architecture)(backbone=lazy_backbone(), architecture=path))
    model.load_state_dict(plain.state_dict())
    expected = apply_architecture(plain, path)
    assert_identical(model.eval()(image()), expected(image()))


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
    """Every submodule and tensor stays, and every training flag."""

    def fingerprint():
        modules = [(name, id(m), type(m), m.training) for name, m in module.named_modules()]
        return modules, {name: id(p) for name, p in module.named_parameters()}

    before, state = fingerprint(), {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(NATSError, match=message) as caught:
        transform(module)
    assert "\n" not in str(caught.value)
    assert fingerprint() == before
    assert_identical(module.state_dict(), state)


@pytest.mark.parametrize(
    "name, space, message",
    [
        (
            "R50",
            dict(num_groups=48),
            "NUM_GROUPS 48 does not fit res3.0.conv2: choose a divisor of",
        ),
        # fits res3 and res4, not res5: nothing may have been changed by then
        (
            "R50",
            dict(convs=["res4.*", "res3.*"], num_groups=64),
            "res3.0.conv2: choose a divisor of its 32 channels",
        ),
        ("R50", dict(channels_per_group=64), "CHANNELS_PER_GROUP 64 does not fit res3.0"),
        (
            "R50",
            dict(convs=["res3.*", "res2.*"]),
            r"CONVS 'res2.\*': nothing to search: res2.0.conv2: it is frozen \(takes no gradient\)"
            r".*Take it out of MODEL.NATS.CONVS, or train these convs \(MODEL.BACKBONE.FREEZE_AT\)",
        ),
        (
            "FPN",
            dict(convs=["bottom_up.*"]),
            r"CONVS 'bottom_up.\*' matches the path bottom_up.res2.0.conv2 of a conv whose name is "
            r"res2.0.conv2: add 'res2.\*', or leave this path out",
        ),
    ],
)
def test_space_that_does_not_fit(name, space, message):
    fails_untouched(lambda b: to_supernet(b, SearchSpace(**space)), build_plain(name), message)


def test_changing_twice():
    plain = build_plain("R50")
    architecture = random_architecture("R50", plain)
    frozen = apply_architecture(copy.deepcopy(plain), architecture)
    supernet = to_supernet(copy.deepcopy(plain), space_of("R50"))
    for network in (frozen, supernet):
        message = "res3.0.conv2 is searched or dilated already: start from the plain network"
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
            "the architecture does not fit: the network lacks res3.4.conv2, res9.0.conv2: near",
        ),
        (
            changed(remove=["res3.1.conv2", "res5.2.conv2"]),
            r"it does not name res3.1.conv2, res5.2.conv2, and must name every 3x3 conv of each "
            r"stage that it changes: res3.1.conv2: \[\[32, 1, 1\]\] leaves one plain",
        ),
        (
            Architecture({f"res4.{i}.conv2": [[64, 1, 1]] for i in range(23)}),
            "lacks res4.6.conv2, .*res4.10.conv2 and 12 more: near",
        ),
        (
            changed({"res5.2.conv2": [[64, 1, 1], [32, 3, 3]]}),
            "does not fit res5.2.conv2: segments of 96 channels do not fit 128 channels",
        ),
    ):
        fails_untouched(lambda b: apply_architecture(b, architecture), plain, message)
