"""What the pictures show; how they look is for eyes."""

import json
import math

import numpy as np
import pytest
import torch
from oracles import build_plain, image, random_architecture

from detectron2_nats import Architecture, NATSError, apply_architecture
from detectron2_nats.look.receptive_field import effective_receptive_fields
from detectron2_nats.show import pictures
from detectron2_nats.show.history import read_history


def line(iteration, entropy, votes):
    return {"iteration": iteration, "alpha/entropy": entropy, "alpha/votes_changed": votes}


def write(path, *lines, tail=""):
    path.write_text("".join(json.dumps(content) + "\n" for content in lines) + tail)
    return str(path)


def test_history_the_last_of_an_iteration_wins(tmp_path):
    layer = {"intensity/res3.0.conv2/1x1": 1.0, "intensity/res5.0.conv2/1x1": 0.5}
    other = {"intensity/res5.0.conv2/5x1": 0.5}
    path = write(
        tmp_path / "metrics.json",
        line(19, 1.0, 0.0) | layer | other,
        line(39, 0.9, 8.0) | layer,
        {"iteration": 39, "bbox/AP": 12.0},  # an evaluation's line has no α
        line(39, 0.8, 7.0) | layer | other,  # written again after a resume
        tail='{"iteration": 59, "alpha/ent',  # killed in the middle
    )
    history = read_history(path)
    assert history["iteration"] == [19, 39]
    assert history["entropy"] == [1.0, 0.8] and history["votes_changed"] == [0.0, 7.0]
    # mean over the layers; one that lacks a genotype gives it nothing
    assert history["intensity"] == {(1, 1): [0.75, 0.75], (5, 1): [0.25, 0.25]}
    picture = pictures.as_image(pictures.plot_history(history))
    assert picture.dtype == np.uint8 and picture.shape[0] == 3 and picture.std() > 10


def test_history_of_one_line(tmp_path):
    path = write(tmp_path / "metrics.json", line(0, 1.0, 0.0) | {"intensity/res3.0.conv2/1x1": 1.0})
    pictures.as_image(pictures.plot_history(read_history(path)))


def test_history_refuses(tmp_path):
    with pytest.raises(NATSError, match="contains no history of α"):
        read_history(write(tmp_path / "metrics.json", {"iteration": 1, "total_loss": 2.0}))
    with pytest.raises(NATSError, match="cannot be read: No such file"):
        read_history(str(tmp_path / "none.json"))


def luminance(colour):
    return sum(w * c for w, c in zip((0.299, 0.587, 0.114), colour))


def test_styles_read_in_grey():
    dilations = [(h, w) for h in range(1, 5) for w in range(1, 5)]
    styles = pictures.dilation_styles(dilations)
    assert set(styles) == set(dilations)
    for hatch in ("", "---", "|||"):
        greys = [luminance(s["facecolor"]) for s in styles.values() if s["hatch"] == hatch]
        # darker with size, by steps that can be told apart
        assert all(a - b > 0.02 for a, b in zip(greys, greys[1:])), hatch
    # the paper's dilations look the same wherever they stand
    assert (
        pictures.dilation_styles([(3, 3)])[3, 3] == pictures.dilation_styles([(1, 1), (3, 3)])[3, 3]
    )


@pytest.mark.parametrize("name", ["R18", "R50"])
def test_architecture_bars_add_up(name):
    figure = pictures.plot_architecture(random_architecture(name, build_plain(name)))
    heights = {}
    for bar in (patch for axes in figure.axes for patch in axes.patches):
        heights[bar.get_x()] = heights.get(bar.get_x(), 0) + bar.get_height()
    assert len(heights) == {"R18": 12, "R50": 13}[name]
    assert all(math.isclose(height, 100) for height in heights.values())


def test_receptive_fields_grow_with_dilation():
    plain, dilated = build_plain("FPN").train(), build_plain("FPN")
    convs = random_architecture("FPN", dilated).layers
    wide = Architecture({n: [[sum(r[0] for r in runs), 1, 3]] for n, runs in convs.items()})
    apply_architecture(dilated, wide)
    modes = [module.training for module in plain.modules()]
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    images = image(128, batch=2)
    fields = [effective_receptive_fields(model, images) for model in (plain, dilated)]
    assert list(fields[0]) == ["res2", "res3", "res4", "res5"]
    assert all(math.isclose(f.sum(), 1, rel_tol=1e-4) for f in fields[0].values())
    # what is not dilated sees the same; what is sees further, and only along the width
    np.testing.assert_array_equal(fields[0]["res2"], fields[1]["res2"])
    rows, columns = ([(f["res3"].sum(axis) > 0).sum() for f in fields] for axis in (1, 0))
    assert rows[0] == rows[1] and columns[0] < columns[1]
    # a look leaves no trace
    assert [module.training for module in plain.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())
    assert all(p.grad is None for p in plain.parameters())
    assert not any(m._forward_hooks for m in plain.modules())


def test_detections():
    images = [np.zeros((20, 30, 3), np.uint8), np.zeros((30, 20, 3), np.uint8)]
    found = [[([1, 2, 10, 12], 0, 0.9), ([5, 5, 9, 9], 7, 0.5)], []]
    figure = pictures.plot_detections(images, {"plain": found, "searched": found[::-1]}, ["disc"])
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    some, none = ["disc 0.90", "7 0.50"], ["nothing detected"]
    assert texts == [some, none, none, some]
