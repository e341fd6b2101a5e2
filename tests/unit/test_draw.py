"""Architectures without a search: what is drawn, and that it fits."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from calls import call
from oracles import build_plain, case_cfg, residual_convs

from detectron2.modeling import build_backbone
from detectron2_nats import Architecture, NATSError, SearchSpace, apply_architecture
from detectron2_nats.commands import draw as command
from detectron2_nats.config import load_config
from detectron2_nats.method.decode import decode_alpha

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [
    ROOT / "configs" / name
    for name in (
        "search/faster_rcnn_X_101_32x4d_FPN.yaml",
        "retrain/retinanet_R_50_FPN.yaml",
        "quickstart/search.yaml",
        "examples/own_data_small_search.yaml",
    )
]


@pytest.mark.parametrize("name, groups", [("FPN", 4), ("ResNeXt", 8), ("R18", 1)])
def test_random_draws_what_studies_have_always_drawn(name, groups):
    network, space = build_plain(name), SearchSpace("C", num_groups=groups)
    rng, layers = np.random.default_rng(3), {}
    for layer, conv in residual_convs(network).items():
        genotypes = space.genotypes.get(f"{layer[:4]}.*")
        if genotypes:
            votes = np.eye(len(genotypes))[rng.choice(len(genotypes), size=groups)]
            layers[layer] = decode_alpha(votes, genotypes, conv.out_channels, "voted")
    drawn = Architecture.random(network, space, seed=3)
    assert drawn == Architecture(layers) and drawn.search == {"method": "random", "seed": 3}
    apply_architecture(network, drawn)


def test_a_supernet_and_a_network_without_weights_give_the_same():
    cfg = case_cfg("FPN")
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    with torch.device("meta"):
        plain = build_backbone(cfg)
        cfg.MODEL.NATS.BASE_BACKBONE, cfg.MODEL.BACKBONE.NAME = (
            cfg.MODEL.BACKBONE.NAME,
            "build_nats_backbone",
        )
        supernet = build_backbone(cfg)
    space = SearchSpace("C")
    assert Architecture.random(plain, space) == Architecture.random(supernet, space)


def test_uniform_by_hand():
    network = torchvision.models.resnet18()
    uniform = Architecture.uniform(network, (1, 5), ["res4.*", "res5.1.*"])
    assert list(uniform.layers) == [
        f"res{stage}.{block}.conv{i}" for stage in (4, 5) for block in (0, 1) for i in (1, 2)
    ]
    assert uniform.layers["res4.0.conv1"] == ((256, 1, 5),)
    assert uniform.layers["res5.0.conv1"] == ((512, 1, 1),)  # the rest of a stage stays plain
    apply_architecture(network, uniform)


def test_what_cannot_be_drawn():
    network = torchvision.models.resnet18()
    for make, words in (
        (lambda: Architecture.uniform(network, (0, 1)), "malformed dilation"),
        (lambda: Architecture.uniform(network, (1, 2), ["res6"]), "near are res"),
        (lambda: Architecture.random(network, SearchSpace(num_groups=7)), "7 does not fit"),
        (lambda: Architecture.uniform(torch.nn.ReLU(), (1, 2)), "near are none"),
    ):
        with pytest.raises(NATSError, match=words):
            make()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_drawn_architectures_fit_a_config_of_each_kind(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, backbone, space = command._detector(str(path), [])
    convs = command._trained(space.convs, backbone)
    drawn = Architecture.random(backbone, command._drawn_from(space, convs, ()), 1)
    assert list(drawn.stages) == [pattern.removesuffix(".*") for pattern in convs]
    apply_architecture(backbone, drawn)


# -- the command --------------------------------------------------------------------------------


CONVS = ["--network", "torchvision:mobilenet_v3_small", "--convs", "features.*"]


def nats_draw(*arguments, status=0):
    return call("nats-draw", *arguments, status=status)


def test_the_command_writes_what_trains_at_full_length(tmp_path):
    arguments = [
        "--config-file",
        ROOT / "configs/quickstart/bars_search.yaml",
        "--random",
        "--seed",
        2,
    ]
    printed = nats_draw(*arguments, "--output", tmp_path, "TEST.AUG.FLIP", "False")
    assert f"wrote {tmp_path}/architecture.yaml\nwrote {tmp_path}/retrain.yaml\n" in printed
    assert "res3.3.conv2" in printed
    assert printed.endswith(f"next: nats-train --config-file {tmp_path}/retrain.yaml\n")
    cfg = load_config(f"{tmp_path}/retrain.yaml")
    assert cfg.SOLVER.MAX_ITER == 400  # the detector's, not the search's
    assert cfg.OUTPUT_DIR == f"{tmp_path}/retrain" and not cfg.TEST.AUG.FLIP
    assert list(cfg.DATASETS.TEST) == ["nats_bars_lying_val"]
    drawn = Architecture.load(f"{tmp_path}/architecture.yaml")
    assert Architecture.from_config(cfg.MODEL.NATS.ARCHITECTURE) == drawn
    assert {sum(c for c, *_ in s) for s in drawn.layers.values()} == {32}
    # what is written can be drawn anew
    again = ["--config-file", tmp_path / "retrain.yaml", "--uniform", "1x3", "--convs", "res3.1.*"]
    nats_draw(*again, "--output", tmp_path / "again")
    written = yaml.safe_load((tmp_path / "again/retrain.yaml").read_text())["MODEL"]["NATS"]
    assert ["res3.1.conv2", [[32, 1, 3]]] in written["ARCHITECTURE"]
    assert ["res3.0.conv2", [[32, 1, 1]]] in written["ARCHITECTURE"]


def test_named_dilations_are_drawn(tmp_path):
    arguments = ["--random", "--dilations", "1x1,1x5,7x7", "--output", tmp_path]
    for where in (["--config-file", ROOT / "configs/quickstart/bars.yaml"], CONVS):
        nats_draw(*where, *arguments)
        layers = Architecture.load(f"{tmp_path}/architecture.yaml").layers.values()
        assert {tuple(d) for segments in layers for _, *d in segments} == {(1, 1), (1, 5), (7, 7)}


def test_patterns_that_cannot_be_changed_are_left_out(tmp_path):
    arguments = ["--config-file", ROOT / "configs/quickstart/bars.yaml", "--uniform", "1x5"]
    printed = nats_draw(*arguments, "--output", tmp_path)
    assert printed.startswith("left out: CONVS 'res4.*' matches no conv that can be searched: near")
    zoo = ["--config-file", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "--uniform", "2x2"]
    zoo += ["--output", tmp_path, "--convs", "res2.*"]
    printed = nats_draw(*zoo, "res5.*")
    assert "left out res2.*: it is frozen (MODEL.BACKBONE.FREEZE_AT)\n" in printed
    assert Architecture.load(f"{tmp_path}/architecture.yaml").stages == ("res5",)
    printed = nats_draw(*zoo, status=2)
    assert printed.endswith("error: no conv is left to change: name some by --convs\n")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--random", "--uniform", "1x2"], "not allowed with"),
        ([], "one of the arguments --uniform --random is required"),
        (["--uniform", "1x0"], "'1x0': expected height x width, each 1 to 64"),
        (["--random", "--dilations", "1x1,2"], "'2': expected height x width"),
        (["--uniform", "1x2", "--dilations", "1x1"], "error: --dilations is for --random"),
        (["--random", "--dilations", "5x5"], "begins with (1, 1)"),
        (["--random", "MODEL.NATS.SPACE", "A"], "error: MODEL.NATS.SPACE: KEY VALUE pairs need"),
    ],
)
def test_bad_arguments(tmp_path, arguments, words):
    network = ["--network", "torchvision:resnet18", "--output", tmp_path]
    assert words in nats_draw(*network, *arguments, status=2)


@pytest.mark.parametrize("name", ["resnet18", "torchvision:resnet19", "timm:no", "mmdet:resnet50"])
def test_unknown_networks(tmp_path, name):
    arguments = ["--network", name, "--uniform", "1x2", "--output", tmp_path]
    assert nats_draw(*arguments, status=2).startswith("error: network ")
