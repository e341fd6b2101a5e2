import os

import numpy as np
import pytest
import yaml

from detectron2.config import CfgNode, get_cfg
from detectron2_nats import Architecture, NATSError, add_nats_config
from detectron2_nats.method.decode import decode_alpha, intensities, votes
from detectron2_nats.method.search_space import PAPER_SETS

LAYERS = {
    "res3.0.conv2": [[64, 1, 1], [32, 1, 3], [32, 3, 3]],
    "res3.1.conv2": [[128, 1, 1]],
    "res5.0.conv1": [[1, 5, 1], [2, 1, 5], [253, 1, 1]],
}
SEARCH = {"space": "C", "num_groups": 16, "order": "paper", "iteration": 256500, "seed": 7}


# -- decoding, against plain loops over section 3.3 -------------------------------------------


@pytest.mark.parametrize("order", ["paper", "voted"])
@pytest.mark.parametrize("stage", ["res3", "res5"])
def test_decode_follows_the_paper(order, stage):
    genotypes, num_groups, channels = PAPER_SETS["C"][stage], 16, 64
    alpha = np.random.RandomState(0).randn(num_groups, len(genotypes))
    chosen = [max(range(len(genotypes)), key=lambda g: row[g]) for row in alpha]
    intensity = [chosen.count(g) / num_groups for g in range(len(genotypes))]
    np.testing.assert_array_equal(votes(alpha), chosen)
    np.testing.assert_array_equal(intensities(alpha), intensity)

    if order == "paper":  # C^g = C · I^g channels, in genotype order
        expected = [
            genotypes[g] for g in range(len(genotypes)) for _ in range(int(channels * intensity[g]))
        ]
    else:  # every group keeps its own channels
        expected = [genotypes[chosen[c * num_groups // channels]] for c in range(channels)]
    runs = decode_alpha(alpha, genotypes, channels, order)
    assert [(d_h, d_w) for count, d_h, d_w in runs for _ in range(count)] == expected
    neighbours = zip(runs, runs[1:])
    assert all(a[1:] != b[1:] for a, b in neighbours), "runs of equal dilation must be one"


@pytest.mark.parametrize("order", ["paper", "voted"])
def test_a_margin_keeps_groups_plain_that_hardly_want_another_dilation(order):
    genotypes = ((1, 1), (3, 3), (1, 3))
    # softmax of log p is p
    alpha = np.log([[0.3, 0.6, 0.1], [0.4, 0.5, 0.1], [0.8, 0.1, 0.1], [0.3, 0.3, 0.4]])
    expected = {
        0.0: ((4, 3, 3), (2, 1, 1), (2, 1, 3)),
        0.09: ((4, 3, 3), (2, 1, 1), (2, 1, 3)),
        0.11: ((2, 3, 3), (6, 1, 1)),
        0.29: ((2, 3, 3), (6, 1, 1)),
        0.31: ((8, 1, 1),),
    }
    for margin, runs in expected.items():
        found = decode_alpha(alpha, genotypes, 8, order, margin)
        assert found == (
            tuple(sorted(runs, key=lambda r: genotypes.index(r[1:]))) if order == "paper" else runs
        ), margin
    for margin in (-0.1, 1.0):
        with pytest.raises(NATSError, match=f"DECODE_MARGIN {margin}"):
            decode_alpha(alpha, genotypes, 8, order, margin)


def test_decode_errors():
    with pytest.raises(NATSError, match=r"unknown DECODE_ORDER 'best': .*\['paper', 'voted'\]"):
        decode_alpha(np.zeros((2, 2)), ((1, 1), (3, 3)), 8, "best")
    for value in (np.nan, np.inf):
        with pytest.raises(NATSError, match="non-finite"):
            decode_alpha(np.array([[0, value]]), ((1, 1), (3, 3)), 8)


@pytest.mark.parametrize("order", ["paper", "voted"])
def test_at_most_so_many_dilations(order):
    """Those with the largest sum of softmax(α) over the groups stand; the groups vote for these."""
    genotypes = ((1, 1), (3, 3), (1, 3))
    # sums: 1.1, 0.9, 2.0; first choices: (3, 3), (1, 1), (1, 3), (1, 3)
    alpha = np.log([[0.2, 0.45, 0.35], [0.5, 0.15, 0.35], [0.2, 0.2, 0.6], [0.2, 0.1, 0.7]])
    expected = {
        0: ((2, 3, 3), (2, 1, 1), (4, 1, 3)),
        3: ((2, 3, 3), (2, 1, 1), (4, 1, 3)),
        2: ((2, 1, 3), (2, 1, 1), (4, 1, 3)),
        1: ((8, 1, 3),),
    }
    for at_most, runs in expected.items():
        found = decode_alpha(alpha, genotypes, 8, order, at_most=at_most)
        if order == "voted":
            assert found == runs, at_most
        counts = {d: sum(c for c, *o in found if tuple(o) == d) for d in genotypes}
        assert counts == {d: sum(c for c, *o in runs if tuple(o) == d) for d in genotypes}
    # a margin holds where (1, 1) stands
    assert decode_alpha(alpha, genotypes, 8, "voted", 0.2, 2) == ((4, 1, 1), (4, 1, 3))
    assert decode_alpha(alpha, genotypes, 8, "voted", 0.2, 1) == ((8, 1, 3),)
    with pytest.raises(NATSError, match="DECODE_AT_MOST -1: expected"):
        decode_alpha(alpha, genotypes, 8, order, at_most=-1)


# -- the value ------------------------------------------------------------------------------


def test_runs_are_canonical():
    parts = Architecture({"res3.0.conv2": [[1, 1, 1]] * 3 + [[2, 3, 1], (4, 3, 1), [1, 1, 1]]})
    assert parts.layers == {"res3.0.conv2": ((3, 1, 1), (6, 3, 1), (1, 1, 1))}
    assert parts == Architecture({"res3.0.conv2": ((3, 1, 1), (6, 3, 1), (1, 1, 1))}, SEARCH)
    assert parts != Architecture({"res3.0.conv2": ((3, 1, 1), (7, 3, 1))})


def test_questions():
    architecture = Architecture({**LAYERS, "fpn_output2": [[8, 1, 3]]}, SEARCH)
    assert architecture.stages == ("res3", "res5")
    assert architecture.channels_per_dilation("res5.0.conv1") == {(1, 1): 253, (1, 5): 2, (5, 1): 1}
    repeated = Architecture({"res4.0.conv2": [[1, 1, 1], [2, 2, 2], [3, 1, 1]]})
    assert repeated.channels_per_dilation("res4.0.conv2") == {(1, 1): 4, (2, 2): 2}
    assert repeated.shares() == {(1, 1): 2 / 3, (2, 2): 1 / 3}


@pytest.mark.parametrize(
    "layers, message",
    [
        ({}, "'layers' must map one or more layer names"),
        ([["res3.0.conv2", [[4, 1, 1]]]], "'layers' must map one or more layer names"),
        ({3: [[4, 1, 1]]}, "layer name 3: expected one like 'res3.0.conv2'"),
        ({"a b": [[4, 1, 1]]}, "layer name 'a b'"),
        ({"res3\n.0": [[4, 1, 1]]}, r"layer name 'res3\\n.0'"),
        ({"res3.0.conv2": []}, r"res3.0.conv2: expected a list of \[channels, d_h, d_w\]"),
        (
            {"res3.0.conv2": [[4, 1]]},
            r"res3.0.conv2: expected \[channels, d_h, d_w\], got \[4, 1\]",
        ),
        ({"res3.0.conv2": [[0, 1, 1]]}, r"res3.0.conv2: expected .*, got \[0, 1, 1\]"),
        ({"res3.0.conv2": [[65537, 1, 1]]}, r"res3.0.conv2: expected .*, got \[65537, 1, 1\]"),
        ({"res3.0.conv2": [[10**5000, 1, 1]]}, "res3.0.conv2: expected .*, got a list too long"),
        ({"res3.0.conv2": [[4, 0, 1]]}, r"res3.0.conv2: malformed dilation \[0, 1\]"),
        ({"res3.0.conv2": [[4, 1, 10**5000]]}, "res3.0.conv2: malformed dilation"),
    ],
)
def test_malformed(layers, message):
    with pytest.raises(NATSError, match=message) as caught:
        Architecture(layers)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_summary():
    layers = {"res3.0.conv2": [[64, 1, 1], [32, 1, 3], [32, 2, 1]], "fpn": [[16, 5, 5], [16, 1, 1]]}
    lines = Architecture(layers).summary().splitlines()
    # means by hand: heights 1, 1, 2 and widths 1, 3, 1 over 64, 32, 32 channels
    assert lines[2].split() == "res3.0.conv2 1x1:64, 1x3:32, 2x1:32 1.2x1.5".split()
    assert lines[3].split() == "fpn 1x1:16, 5x5:16 3.0x3.0".split()


# -- files ----------------------------------------------------------------------------------


def test_file_round_trip(tmp_path):
    path = str(tmp_path / "new" / "architecture.yaml")
    original = Architecture(LAYERS, SEARCH)
    original.save(path)
    loaded = Architecture.load(path)
    assert loaded == original and list(loaded.layers) == list(LAYERS)
    assert loaded.search == SEARCH
    assert os.listdir(tmp_path / "new") == ["architecture.yaml"]


def test_file_is_what_the_readme_shows(tmp_path):
    path = tmp_path / "architecture.yaml"
    Architecture(LAYERS, SEARCH).save(str(path))
    text = path.read_text()
    assert "  res3.0.conv2: [[64, 1, 1], [32, 1, 3], [32, 3, 3]]\n" in text
    assert yaml.safe_load(text) == {
        "format": "detectron2-nats/1",
        "layers": LAYERS,
        "search": SEARCH,
    }
    assert Architecture.from_dict(yaml.safe_load(text)) == Architecture(LAYERS)
    Architecture(LAYERS).save(str(path))
    assert "search" not in path.read_text()


@pytest.mark.parametrize("names", ["paths", "stages"])
def test_files_of_before_said_what_their_names_are(tmp_path, names):
    layers = {"res3.0.conv2": [[4, 1, 3]]}
    if names == "paths":
        layers = {"bottom_up.res3.0.conv2": [[4, 1, 3]], "fpn_output2": [[4, 1, 1]]}
    path = tmp_path / "architecture.yaml"
    path.write_text(yaml.dump({"format": "detectron2-nats/1", "names": names, "layers": layers}))
    assert Architecture.load(str(path)) == Architecture(layers)
    assert Architecture.from_config([list(item) for item in layers.items()]).layers == (
        Architecture(layers).layers
    )


HEAD = "format: detectron2-nats/1\n"


@pytest.mark.parametrize(
    "content, reason",
    [
        ("", "expected a mapping with 'format: detectron2-nats/1'"),
        ("format: detectron2-nats/2\n", "expected a mapping with 'format: detectron2-nats/1'"),
        (HEAD, "'layers' must map one or more layer names"),
        (HEAD + "layers: {res3.0.conv2: [[4, 1, 1]]}\nlayer: 1\n", "unknown keys 'layer'"),
        (HEAD + "layers: {res3.0.conv2: [[4, 1, 1]]}\nsearch: [1]\n", "must be a mapping"),
        (HEAD + "layers: {res3.0.conv2: [[4, 1, 1]], res3.0.conv2: [[4, 2, 2]]}\n", "duplicate"),
        (HEAD + "layers: !!python/object:builtins.dict {}\n", "constructor"),
        (HEAD + "layers: [\n", "not readable as plain YAML"),
        (b"\x80\x02}q\x00.", "not a UTF-8 text file"),
        (b"#" * (8 * 2**20 + 1), "larger than the limit of 8388608 bytes"),
    ],
)
def test_bad_file(tmp_path, content, reason):
    path = tmp_path / "a"  # a name that is part of every message is named all the same
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(NATSError) as caught:
        Architecture.load(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and reason in message
    assert "\n" not in message and len(message) < 500


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_missing_file_and_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NATSError, match=rf"^{name}: cannot be read: "):
        Architecture.load(name)


# -- configs --------------------------------------------------------------------------------


def nats_cfg() -> CfgNode:
    cfg = get_cfg()
    add_nats_config(cfg)
    return cfg


def test_config_round_trip(tmp_path):
    architecture = Architecture(LAYERS)
    cfg = nats_cfg()
    cfg.MODEL.NATS.ARCHITECTURE = architecture.to_config()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = nats_cfg()
    again.merge_from_file(str(tmp_path / "config.yaml"), allow_unsafe=False)
    loaded = Architecture.from_config(again.MODEL.NATS.ARCHITECTURE)
    assert loaded == architecture and list(loaded.layers) == list(LAYERS)
    assert again.MODEL.NATS == cfg.MODEL.NATS


@pytest.mark.parametrize(
    "value, message",
    [
        ({"res3.0.conv2": [[4, 1, 1]]}, r"must be a list of \[layer name, segments\]"),
        ([["res3.0.conv2"]], r"must be a list of \[layer name, segments\]"),
        ([["res3.0.conv2", [[4, 1, 1]]]] * 2, "names layers twice: res3.0.conv2"),
    ],
)
def test_malformed_config_value(value, message):
    with pytest.raises(NATSError, match=message):
        Architecture.from_config(value)


def test_shipped_architectures_load_by_name_and_say_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bars_lying", "bars_standing"):
        search = Architecture.load(name).search
        assert {"data", "network", "command", "seed", "decidedness", "retrained AP"} <= set(search)
    (tmp_path / "bars_lying").write_text("a file of that name comes first")
    with pytest.raises(NATSError, match="bars_lying: not an architecture file"):
        Architecture.load("bars_lying")
    with pytest.raises(NATSError, match="bars_leaning: cannot be read: No such file"):
        Architecture.load("bars_leaning")
