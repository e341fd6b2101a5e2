import copy
import pickle

import numpy as np
import pytest
import torch
from oracles import (
    BACKBONES,
    FPN_RESNET,
    RUNNABLE,
    assert_identical,
    build,
    build_plain,
    case_cfg,
    has_dilations,
    image,
    random_architecture,
    randomized,
    residual_convs,
    tiny_cfg,
)

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from detectron2.utils.analysis import FlopCountAnalysis
from detectron2_nats import (
    Architecture,
    MixedDilationConv2d,
    NATSError,
    add_nats_config,
    apply_architecture,
)
from detectron2_nats.backbone import search_space_from_config
from detectron2_nats.config import load_config
from detectron2_nats.method.names import searched_layers
from detectron2_nats.method.sampling import SampledDilationConv2d
from detectron2_nats.method.search_space import PAPER_SETS


def nats(cfg, architecture=None, **kwargs):
    """The config with its backbone wrapped by build_nats_backbone."""
    cfg = cfg.clone()
    cfg.MODEL.NATS.BASE_BACKBONE = cfg.MODEL.BACKBONE.NAME
    cfg.MODEL.BACKBONE.NAME = "build_nats_backbone"
    if architecture is not None:
        cfg.MODEL.NATS.ARCHITECTURE = architecture.to_config()
    for key, value in kwargs.items():
        cfg.MODEL.NATS[key] = value
    return cfg


def nats_cfg():
    cfg = get_cfg()
    add_nats_config(cfg)
    return cfg


def detector_cfg(meta="GeneralizedRCNN"):
    if meta == "RetinaNet":
        opts = ["RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]]
        opts += ["META_ARCHITECTURE", "RetinaNet", "RETINANET.NUM_CLASSES", 3]
        opts += ["ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]]
        return tiny_cfg("build_retinanet_resnet_fpn_backbone", opts)
    opts = ["ROI_HEADS.NAME", "StandardROIHeads", "ROI_HEADS.NUM_CLASSES", 3]
    opts += ["ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]]
    opts += ["RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]]
    opts += ["ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]]
    # so few that there are always as many, whatever the features are
    opts += ["RPN.POST_NMS_TOPK_TEST", 5, "ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"]
    opts += ["ROI_BOX_HEAD.NUM_FC", 1, "ROI_BOX_HEAD.FC_DIM", 16]
    return tiny_cfg(FPN_RESNET, opts)


# -- the builder ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "Lazy"])
def test_builds_super_network_and_frozen_network(name):
    stages = BACKBONES[name][2].split()
    plain = build_plain(name)
    options = dict(CONVS=[f"{stage}.*" for stage in stages], NUM_GROUPS=4, SPACE="A")
    supernet = build(nats(case_cfg(name), **options))
    assert type(supernet) is type(plain) and supernet.output_shape() == plain.output_shape()
    for layer, conv in residual_convs(supernet).items():
        assert isinstance(conv, MixedDilationConv2d) == (layer.split(".")[0] in stages)
    assert all(c.genotypes == PAPER_SETS["A"][k[:4]] for k, c in searched_layers(supernet).items())

    architecture = random_architecture(name, plain)
    frozen = build(nats(case_cfg(name), architecture)).eval()
    frozen.load_state_dict(plain.state_dict())
    for layer, conv in residual_convs(frozen).items():
        assert has_dilations(conv) == (layer in architecture.layers)
    if name in RUNNABLE:
        assert_identical(frozen(image()), apply_architecture(plain, architecture)(image()))


@pytest.mark.parametrize(
    "num_groups, channels_per_group, expected",
    [(8, 0, (8, None)), (16, 32, (None, 32)), (0, 32, (None, 32)), (1, 0, (1, None))],
)
def test_group_keys(num_groups, channels_per_group, expected):
    cfg = nats_cfg()
    cfg.MODEL.NATS.NUM_GROUPS, cfg.MODEL.NATS.CHANNELS_PER_GROUP = num_groups, channels_per_group
    space = search_space_from_config(cfg)
    assert (space.num_groups, space.channels_per_group) == expected


@pytest.mark.parametrize("key", ["SHARE_WEIGHTS", "SAMPLE"])
def test_keys_without_replicas(key):
    supernet = build_backbone(nats(case_cfg("R50"), **{key: True}))
    for conv in searched_layers(supernet).values():
        assert conv.replicas is None
        assert isinstance(conv, SampledDilationConv2d) == (key == "SAMPLE")
    assert not any("replicas" in key for key in supernet.state_dict())


@pytest.mark.parametrize("name", ["build_nats_backbone", "resnet"])
def test_base_backbone_that_is_not_usable(name):
    cfg = nats(case_cfg("R50"), BASE_BACKBONE=name)
    known = [k for k, _ in BACKBONE_REGISTRY if k != "build_nats_backbone"]
    message = f"MODEL.NATS.BASE_BACKBONE '{name}' is not usable: expected one of "
    with pytest.raises(NATSError, match=message) as caught:
        build_backbone(cfg)
    assert str(caught.value).split("one of ")[1].split(", ") == sorted(known)


@pytest.mark.parametrize(
    "options, keys, message",
    [
        ([], dict(SPACE="D"), "unknown SPACE 'D': expected one of A, B, C"),
        (["BACKBONE.FREEZE_AT", 3], {}, r"'res3.\*': nothing .*frozen .*MODEL.BACKBONE.FREEZE_AT"),
        ([], dict(CONVS=[]), r"CONVS \[\]: expected a list of patterns of names"),
        ([], dict(ARCHITECTURE=[["res3.0.conv2", [[32, 1, 1]]]]), "does not name res3.1.conv2"),
        ([], dict(ARCHITECTURE=[["res3.0.conv2"]]), r"must be a list of \[layer name, segments\]"),
    ],
)
def test_bad_configs(options, keys, message):
    cfg = case_cfg("R50")
    options = list(options)
    options[::2] = [f"MODEL.{key}" for key in options[::2]]
    cfg.merge_from_list(options)
    with pytest.raises(NATSError, match=message):
        build_backbone(nats(cfg, **keys))


# -- config files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A", {"res3.*": ((1, 1), (3, 3)), "res5.*": ((1, 1), (3, 3), (5, 5))}),
        (
            "[[[1, 1], [2, 1]], [[1, 1]], [[1, 1], [1, 5]]]",
            {"res3.*": ((1, 1), (2, 1)), "res4.*": ((1, 1),), "res5.*": ((1, 1), (1, 5))},
        ),
    ],
)
def test_space_as_string_or_list(tmp_path, text, expected):
    path = tmp_path / "config.yaml"
    path.write_text(f"VERSION: 2\nMODEL: {{NATS: {{SPACE: {text}}}}}\n")
    from_file, from_list = nats_cfg(), nats_cfg()
    from_file.merge_from_file(str(path), allow_unsafe=False)
    from_list.merge_from_list(["MODEL.NATS.SPACE", text])
    (tmp_path / "dumped.yaml").write_text(from_file.dump())
    dumped = nats_cfg()
    dumped.merge_from_file(str(tmp_path / "dumped.yaml"), allow_unsafe=False)
    for cfg in (from_file, from_list, dumped):
        genotypes = search_space_from_config(cfg).genotypes
        assert {pattern: genotypes[pattern] for pattern in expected} == expected


@pytest.mark.parametrize(
    "stages, line",
    [
        ("[res3]", 'MODEL.NATS.CONVS: ["res3.*"]'),
        ("['res2', 'res5']", 'MODEL.NATS.CONVS: ["res2.*", "res5.*"]'),
        ("{a: 1}", 'MODEL.NATS.CONVS: ["res3.*", "res4.*", "res5.*"]'),
    ],
)
def test_stages_are_refused_with_the_line_to_write(tmp_path, stages, line):
    """In a file, in its base, and on the command line."""
    (tmp_path / "base.yaml").write_text(f"MODEL: {{NATS: {{STAGES: {stages}}}}}\n")
    (tmp_path / "child.yaml").write_text("_BASE_: base.yaml\n")
    for path in ("base.yaml", "child.yaml"):
        with pytest.raises(NATSError) as caught:
            load_config(str(tmp_path / path))
        assert str(caught.value) == (
            f"{tmp_path}/base.yaml: MODEL.NATS.STAGES is gone, a stage is a pattern of names now: "
            f"write {line}"
        )
    with pytest.raises(NATSError, match="^command line: MODEL.NATS.STAGES is gone") as caught:
        load_config("", ["MODEL.NATS.STAGES", stages])
    assert str(caught.value).endswith(line)


def test_frozen_network_from_a_dumped_config(tmp_path):
    plain = build_plain("FPN")
    architecture = random_architecture("FPN", plain)
    (tmp_path / "config.yaml").write_text(nats(case_cfg("FPN"), architecture).dump())
    cfg = nats_cfg()
    cfg.merge_from_file(str(tmp_path / "config.yaml"), allow_unsafe=False)
    assert Architecture.from_config(cfg.MODEL.NATS.ARCHITECTURE) == architecture
    frozen = build_backbone(cfg).eval()
    frozen.load_state_dict(plain.state_dict())
    assert_identical(frozen(image()), apply_architecture(plain, architecture)(image()))


# -- detectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("meta", ["GeneralizedRCNN", "RetinaNet"])
def test_frozen_detector_has_the_keys_parameters_and_flops_of_plain(meta):
    """Invariant 2."""
    cfg = detector_cfg(meta)
    plain = randomized(build_model(cfg)).eval()
    architecture = random_architecture("FPN", plain)
    frozen = build_model(nats(cfg, architecture)).eval()
    shapes = {k: (v.shape, v.dtype) for k, v in plain.state_dict().items()}
    assert list(frozen.state_dict()) == list(shapes)
    assert {k: (v.shape, v.dtype) for k, v in frozen.state_dict().items()} == shapes
    trained = [{k: p.requires_grad for k, p in m.named_parameters()} for m in (plain, frozen)]
    assert trained[0] == trained[1]
    frozen.load_state_dict(plain.state_dict())
    inputs = [{"image": image(64)[0] * 50}]
    counts = []
    for model in (plain, frozen):
        flops = FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False)
        counts.append((flops.total(), flops.by_operator(), flops.by_module()))
    assert counts[0] == counts[1]
    assert any(k.endswith("res5.0.conv2") and n > 0 for k, n in counts[0][2].items())


def test_all_plain_architecture_gives_the_plain_detections():
    """Invariant 1, for a detector."""
    cfg = detector_cfg()
    plain = randomized(build_model(cfg)).eval()
    convs = residual_convs(plain)
    architecture = Architecture({k: [[c.out_channels, 1, 1]] for k, c in convs.items()})
    frozen = build_model(nats(cfg, architecture)).eval()
    frozen.load_state_dict(plain.state_dict())
    with torch.no_grad():
        results = [m([{"image": image(64)[0] * 50}])[0]["instances"] for m in (plain, frozen)]
    assert len(results[0]) > 0
    for field in ("pred_boxes", "scores", "pred_classes"):
        a, b = (r.get(field) for r in results)
        a, b = (getattr(t, "tensor", t) for t in (a, b))
        assert torch.equal(a, b)


# -- checkpoints, by Detectron2's own matching ----------------------------------------------


class Checkpointer(DetectionCheckpointer):
    """Remembers what did not match."""

    def _log_incompatible_keys(self, incompatible):
        self.incompatible = incompatible
        super()._log_incompatible_keys(incompatible)


def load(model, path):
    """Load the file; returns the missing and the unexpected keys."""
    checkpointer = Checkpointer(model)
    checkpointer.incompatible = None
    checkpointer.load(str(path))
    found = checkpointer.incompatible
    if found is None:
        return [], []
    assert not found.incorrect_shapes
    return sorted(found.missing_keys), sorted(found.unexpected_keys)


def assert_holds(model, plain_state, prefix=""):
    """All of `plain_state` is in the model, replicas are copies, α is 0."""
    state = model.state_dict()
    for key, value in plain_state.items():
        assert torch.equal(state[prefix + key], value), key
    for conv in searched_layers(model).values():
        assert not conv.alpha.any()
        assert all(torch.equal(replica, conv.weight) for replica in conv.replicas)


def both_forms(cfg, name, seed=1):
    """A super-network and a frozen network of other random weights."""
    torch.manual_seed(seed)
    return build(nats(cfg)), build(nats(cfg, random_architecture(name, build(cfg))))


@pytest.mark.parametrize("name", ["R18", "RetinaNet"])
def test_plain_state_dict_loads_into_both(name):
    plain = build_plain(name)
    state = plain.state_dict()
    cfg = case_cfg(name)
    cfg.MODEL.NATS.NUM_GROUPS, cfg.MODEL.NATS.SPACE = 4, "A"
    for network in both_forms(cfg, name):
        network.load_state_dict(state)  # strict
        assert_holds(network, state)
        assert list(state) == list(plain.state_dict())


def test_pkl_of_a_classifier(tmp_path):
    """A converted torchvision model's, into detectors with an FPN; C2's: test_paper.py."""
    plain = build_plain("R50").half().float()
    arrays = {k: v.numpy() for k, v in plain.state_dict().items()}
    arrays["fc.weight"] = np.zeros((10, 256), np.float32)
    arrays = {k: v.astype(np.float16) for k, v in arrays.items()}
    content = {"model": arrays, "__author__": "test", "matching_heuristics": True}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(content))

    cfg = detector_cfg()
    detector = build_model(cfg)
    supernet = build_model(nats(cfg))
    frozen = build_model(nats(cfg, random_architecture("FPN", detector)))
    expected = load(detector, path)
    assert not any("bottom_up" in key for key in expected[0])
    for network in (supernet, frozen):
        assert load(network, path) == expected, "the same keys as in the plain detector"
        assert_holds(network, plain.state_dict(), "backbone.bottom_up.")


def test_detectron2s_own_checkpoint_of_a_detector(tmp_path):
    cfg = detector_cfg()
    detector = randomized(build_model(cfg))
    DetectionCheckpointer(detector, str(tmp_path)).save("model", iteration=5)
    supernet = build_model(nats(cfg))
    frozen = build_model(nats(cfg, random_architecture("FPN", detector)))
    for network in (supernet, frozen):
        assert load(network, tmp_path / "model.pth") == ([], [])
        assert_holds(network, detector.state_dict())


def test_super_network_checkpoint_round_trip(tmp_path):
    cfg = nats(detector_cfg())
    source, target = build_model(cfg), build_model(cfg)
    for parameter in source.parameters():
        parameter.data.normal_()
    before = copy.deepcopy(source.state_dict())
    DetectionCheckpointer(source, str(tmp_path)).save("model")
    assert load(target, tmp_path / "model.pth") == ([], [])
    assert_identical(target.state_dict(), before)
    assert any(key.endswith("res5.2.conv2.alpha") for key in before)
    assert any(key.endswith("res5.2.conv2.replicas") for key in before)
