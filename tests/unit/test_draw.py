"""Architectures without a search: what is drawn, and that it fits."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from oracles import build_plain, case_cfg

from detectron2.modeling import build_backbone
from detectron2_nats import Architecture, NATSError, SearchSpace, apply_architecture
from detectron2_nats.commands import draw as command
from detectron2_nats.config import load_config
from detectron2_nats.method import draw
from detectron2_nats.method.decode import decode_alpha
from detectron2_nats.method.stages import conv3x3_layers

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("name, groups", [("FPN", 4), ("ResNeXt", 8), ("R18", 1)])
@pytest.mark.parametrize("uneven", [False, True])
def test_random_draws_what_studies_have_always_drawn(name, groups, uneven):
    network, space = build_plain(name), SearchSpace("C", num_groups=groups)
    rng, layers = np.random.default_rng(3), {}
    for layer, conv in conv3x3_layers(network).items():
        genotypes = space.genotypes.get(layer[:4])
        if genotypes:
            chances = rng.dirichlet(np.ones(len(genotypes))) if uneven else None
            votes = np.eye(len(genotypes))[rng.choice(len(genotypes), size=groups, p=chances)]
            layers[layer] = decode_alpha(votes, genotypes, conv.out_channels, "voted")
    drawn = Architecture.random(network, space, seed=3, uneven=uneven)
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


def per_group(architecture, groups):
    """(N,) pairs of all groups, layer by layer."""
    found = []
    for segments in architecture.layers.values():
        channels = [tuple(d) for count, *d in segments for _ in range(count)]
        found += channels[:: len(channels) // groups]
    return found


@pytest.mark.parametrize("groups", [1, 4])
def test_the_share_that_stays_plain(groups):
    network = build_plain("FPN")
    space = SearchSpace([[[1, 1], [2, 2]] * 1] * 3, num_groups=groups)
    without, half, whole = (
        per_group(Architecture.random(network, space, 5, plain), groups) for plain in (0, 0.5, 1)
    )
    assert set(whole) == {(1, 1)}
    changed = sum(a != b for a, b in zip(without, half))
    assert 0 < changed <= round(0.5 * len(half))
    assert all(a == b or b == (1, 1) for a, b in zip(without, half))
    # where every group would leave (1, 1), exactly the share stays
    layers = draw.random_layers(network, Leaving(groups), 0, 0.25, False)
    found = per_group(Architecture(layers), groups)
    assert found.count((1, 1)) == round(0.25 * len(found))


class Leaving(SearchSpace):
    """One genotype, and not the plain one."""

    def __init__(self, groups):
        super().__init__("A", num_groups=groups)
        object.__setattr__(self, "genotypes", dict.fromkeys(self.stages, ((2, 2),)))


def test_uniform_cycle_and_sawtooth_by_hand():
    network = torchvision.models.resnet18()
    stages = ["res4", "res5"]
    layers = [f"{stage}.{block}.conv{i}" for stage in stages for block in (0, 1) for i in (1, 2)]
    uniform = Architecture.uniform(network, (1, 5), stages)
    assert list(uniform.layers) == layers
    assert uniform.layers["res4.0.conv1"] == ((256, 1, 5),)
    cycle = Architecture.cycle(network, [(1, 1), (2, 2), (1, 1), (4, 4)], ["res5"])
    assert cycle.layers["res5.0.conv1"][:5] == (
        *((1, 1, 1), (1, 2, 2), (1, 1, 1), (1, 4, 4)),
        (1, 1, 1),
    )
    assert cycle.channels_per_dilation("res5.1.conv2") == {(1, 1): 256, (2, 2): 128, (4, 4): 128}
    sawtooth = Architecture.sawtooth(network, stages=stages)
    dilations = [segments[0][1] for segments in sawtooth.layers.values()]
    assert dilations == [1, 2, 3, 1, 2, 3, 1, 2]
    for architecture in (uniform, cycle, sawtooth):
        apply_architecture(torchvision.models.resnet18(), architecture)
    assert cycle == Architecture.cycle(network, stages=["res5"])  # the default


def test_conv_groups_take_turns_as_wholes():
    network = build_plain("ResNeXt")  # 8 conv groups
    cycle = Architecture.cycle(network, [(1, 1), (1, 3)])
    rows = conv3x3_layers(network)["res3.0.conv2"].out_channels // 8
    assert cycle.layers["res3.0.conv2"] == ((rows, 1, 1), (rows, 1, 3)) * 4
    apply_architecture(network, cycle)


def test_what_cannot_be_drawn():
    network = torchvision.models.resnet18()
    for make, words in (
        (lambda: Architecture.uniform(network, (0, 1)), "malformed dilation"),
        (lambda: Architecture.uniform(network, (1, 2), ["res6"]), "res6' is missing.* res2, res3"),
        (lambda: Architecture.uniform(network, (1, 2), "res5"), "expected a list"),
        (lambda: Architecture.cycle(network, []), "list of dilation pairs"),
        (lambda: Architecture.sawtooth(network, [(1, 99)]), "malformed dilation"),
        (lambda: Architecture.random(network, SearchSpace(), plain=1.5), "1.5: expected 0 to 1"),
        (lambda: Architecture.random(network, SearchSpace(num_groups=7)), "7 does not divide"),
        (lambda: Architecture.uniform(torch.nn.ReLU(), (1, 2)), "no residual stages"),
    ):
        with pytest.raises(NATSError, match=words):
            make()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_drawn_architectures_fit_every_config(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, backbone, space, known = command._detector(str(path), [])
    stages = command._kept(None, space.stages, backbone)
    for architecture in (
        Architecture.random(backbone, command._drawn_from(space, known, stages, (), ()), 1, 0.5),
        Architecture.uniform(backbone, (1, 5), stages),
        Architecture.cycle(backbone, stages=stages),
        Architecture.sawtooth(backbone, stages=stages),
    ):
        assert list(architecture.stages) == stages
        apply_architecture(copy.deepcopy(backbone), architecture)


# -- the command --------------------------------------------------------------------------------


CONVS = ["--network", "torchvision:mobilenet_v3_small", "--convs", "features.*"]


def nats_draw(monkeypatch, capsys, *arguments, status=0):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["nats-draw", *map(str, arguments)])
    if not status:
        command.run()
        return capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        command.run()
    assert end.value.code == status
    return capsys.readouterr().err


def test_the_command_writes_what_trains_at_full_length(tmp_path, monkeypatch, capsys):
    arguments = ["--config-file", "configs/quickstart/bars_search.yaml", "--random", "--seed", 2]
    printed = nats_draw(
        monkeypatch, capsys, *arguments, "--output", tmp_path, "TEST.AUG.FLIP", "False"
    )
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
    again = [
        "--config-file",
        tmp_path / "retrain.yaml",
        "--sawtooth",
        "1x1,1x3",
        "--stages",
        "res3",
    ]
    nats_draw(monkeypatch, capsys, *again, "--output", tmp_path / "again")
    found = yaml.safe_load((tmp_path / "again/retrain.yaml").read_text())["MODEL"]["NATS"]
    assert found["ARCHITECTURE"][1] == ["res3.1.conv2", [[32, 1, 3]]]


def test_named_dilations_are_drawn(tmp_path, monkeypatch, capsys):
    arguments = ["--random", "--dilations", "1x1,1x5,7x7", "--output", tmp_path]
    for where in (["--config-file", "configs/quickstart/bars.yaml"], CONVS):
        nats_draw(monkeypatch, capsys, *where, *arguments)
        layers = Architecture.load(f"{tmp_path}/architecture.yaml").layers.values()
        assert {tuple(d) for segments in layers for _, *d in segments} == {(1, 1), (1, 5), (7, 7)}


def test_stages_that_cannot_be_changed_are_left_out(tmp_path, monkeypatch, capsys):
    arguments = ["--config-file", "configs/quickstart/bars.yaml", "--uniform", "1x5"]
    printed = nats_draw(monkeypatch, capsys, *arguments, "--output", tmp_path)
    assert printed.startswith("left out res4: the network does not build it")
    zoo = ["--config-file", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "--uniform", "2x2"]
    zoo += ["--output", tmp_path, "--stages", "res2"]
    printed = nats_draw(monkeypatch, capsys, *zoo, "res5")
    assert "left out res2: it is frozen (MODEL.BACKBONE.FREEZE_AT)\n" in printed
    assert Architecture.load(f"{tmp_path}/architecture.yaml").stages == ("res5",)
    printed = nats_draw(monkeypatch, capsys, *zoo, status=2)
    assert (
        printed == "error: no stage is left to change: name some of res3, res4, res5 by --stages\n"
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--random", "--uniform", "1x2"], "not allowed with"),
        ([], "one of the arguments --random --uniform --cycle --sawtooth is required"),
        (["--uniform", "1x0"], "'1x0': expected height x width, each 1 to 64"),
        (["--cycle", "1x1,2"], "'2': expected height x width"),
        (["--uniform", "1x2", "--plain", "0.5"], "error: --plain is for --random: give both"),
        (["--uniform", "1x2", "--dilations", "1x1"], "error: --dilations is for --random"),
        (["--random", "--dilations", "5x5"], "must begin with (1, 1)"),
        (["--random", "--plain", "2"], "'2': expected a share"),
        (["--random", "MODEL.NATS.SPACE", "A"], "error: MODEL.NATS.SPACE: KEY VALUE pairs need"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, words):
    network = ["--network", "torchvision:resnet18", "--output", tmp_path]
    assert words in nats_draw(monkeypatch, capsys, *network, *arguments, status=2)


@pytest.mark.parametrize("name", ["resnet18", "torchvision:resnet19", "timm:no", "mmdet:resnet50"])
def test_unknown_networks(tmp_path, monkeypatch, capsys, name):
    arguments = ["--network", name, "--uniform", "1x2", "--output", tmp_path]
    assert nats_draw(monkeypatch, capsys, *arguments, status=2).startswith("error: network ")
