"""What nats-show counts, reads and draws; how pictures look is for eyes."""

import json
import math

import numpy as np
import pytest
import torch
from oracles import build_plain, random_architecture
from PIL import Image
from torch import nn

from detectron2_nats import NATSError, apply_architecture
from detectron2_nats.show import pictures
from detectron2_nats.show.cost import backbone_cost, interleaved_seconds
from detectron2_nats.show.history import last_precision, read_history


def line(iteration, entropy, loss):
    return {"iteration": iteration, "alpha/entropy": entropy, "total_loss": loss}


def write(path, *lines, tail=""):
    path.write_text("".join(json.dumps(content) + "\n" for content in lines) + tail)
    return str(path)


def read_picture(figure, folder):
    return np.asarray(Image.open(pictures.save(figure, str(folder), "picture")).convert("RGB"))


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
    assert history["entropy"] == [1.0, 0.8] and history["total_loss"] == [0.0, 7.0]
    # mean over the layers; one that lacks a genotype gives it nothing
    assert history["intensity"] == {(1, 1): [0.75, 0.75], (5, 1): [0.25, 0.25]}
    assert read_picture(pictures.plot_history(history), tmp_path).std() > 10


def test_history_refuses(tmp_path):
    with pytest.raises(NATSError, match="contains no history of α"):
        read_history(write(tmp_path / "metrics.json", {"iteration": 1, "total_loss": 2.0}))
    with pytest.raises(NATSError, match="contains no history of α"):
        read_history(str(tmp_path / "none.json"))


@pytest.mark.parametrize("name", ["R18", "R50"])
def test_architecture_bars_add_up(name):
    figure = pictures.plot_architecture(random_architecture(name, build_plain(name)))
    heights = {}
    for bar in (patch for axes in figure.axes for patch in axes.patches):
        heights[bar.get_x()] = heights.get(bar.get_x(), 0) + bar.get_height()
    assert len(heights) == {"R18": 12, "R50": 13}[name]
    assert all(math.isclose(height, 100) for height in heights.values())


def test_the_last_evaluation(tmp_path):
    lines = [{"iteration": 9, "bbox/AP": 1.0}, {"iteration": 19, "bbox/AP": 12.34, "bbox/AP50": 30}]
    path = write(tmp_path / "metrics.json", *lines, {"iteration": 29, "total_loss": 1.0})
    assert last_precision(path) == "bbox/AP 12.3, bbox/AP50 30.0"
    assert last_precision(str(tmp_path / "none.json")) == ""


# -- cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ResNeXt", "DC5"])
def test_a_searched_backbone_costs_what_the_plain_one_does(name):
    plain, searched = build_plain(name), build_plain(name)
    apply_architecture(searched, random_architecture(name, searched))
    assert backbone_cost(plain, 64, 96) == backbone_cost(searched, 64, 96)


class _TwoConvs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.second = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=True)

    def forward(self, x):
        return {"y": self.second(self.first(x))}


def test_cost_by_hand_and_without_a_trace():
    network = _TwoConvs()
    network.first.eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    cost = backbone_cost(network, 8, 16)
    assert cost["parameters"] == 3 * 4 * 9 + 4 * 8 * 9 + 8
    assert cost["FLOPs"] == 8 * 16 * 3 * 4 * 9 + 4 * 8 * 4 * 8 * 9
    assert [m.training for m in network.modules()] == [True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_interleaved_seconds():
    calls = []
    functions = [lambda: calls.append("a"), lambda: calls.append("b")]
    seconds = interleaved_seconds(functions, rounds=2, warm_up=1)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in seconds] == [2, 2]
