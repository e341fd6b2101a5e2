"""Costs of plain and searched backbones, and the table of an architecture."""

import pytest
import torch
from oracles import build_plain, random_architecture
from torch import nn

from detectron2_nats import Architecture, apply_architecture
from detectron2_nats.show.cost import (
    Cost,
    backbone_cost,
    cost_table,
    interleaved_seconds,
)


@pytest.mark.parametrize("name", ["R18", "FPN", "ResNeXt", "DC5", "Lazy"])
def test_a_searched_backbone_costs_what_the_plain_one_does(name):
    plain, searched = build_plain(name), build_plain(name)
    architecture = random_architecture(name, searched)
    apply_architecture(searched, architecture)
    costs = backbone_cost(plain, 64, 96), backbone_cost(searched, 64, 96)
    assert costs[0] == costs[1]
    assert cost_table(*costs).count("equal") == 3


class _TwoConvs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.second = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=True)

    def forward(self, x):
        return {"y": self.second(self.first(x))}


def test_cost_by_hand():
    cost = backbone_cost(_TwoConvs(), 8, 16)
    assert cost.parameters == 3 * 4 * 9 + 4 * 8 * 9 + 8
    assert cost.flops == 8 * 16 * 3 * 4 * 9 + 4 * 8 * 4 * 8 * 9
    assert cost.activations == 4 * 8 * 16 + 8 * 4 * 8


def test_counting_leaves_the_mode_alone():
    backbone = build_plain("R18").train()
    modes = [module.training for module in backbone.modules()]
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone_cost(backbone, 32, 32)
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_cost_table_says_by_how_much():
    table = cost_table(Cost(1000, 2_000_000, 5), Cost(1000, 2_010_000, 4)).splitlines()
    assert table[0].split() == ["plain", "searched", "difference"]
    assert table[2].split() == ["parameters", "1,000", "1,000", "equal"]
    assert table[3].split() == ["flops", "2,000,000", "2,010,000", "+10,000", "(+0.500%)"]
    assert table[4].split() == ["activations", "5", "4", "-1", "(-20.000%)"]


def test_interleaved_seconds():
    calls = []
    functions = [lambda: calls.append("a"), lambda: calls.append("b")]
    seconds = interleaved_seconds(functions, rounds=2, warm_up=1)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in seconds] == [2, 2]


def test_summary():
    architecture = Architecture(
        {
            "res3.0.conv2": [[64, 1, 1], [32, 1, 3], [32, 2, 1]],
            "res3.1.conv2": [[16, 1, 1], [16, 5, 5], [96, 1, 1]],
        }
    )
    lines = architecture.summary().splitlines()
    assert lines[0].split("  ")[0] == "layer"
    # extents by hand: heights 3, 3, 5 and widths 3, 7, 3 over 64, 32, 32 channels
    assert lines[2].split() == "res3.0.conv2 1x1:64, 1x3:32, 2x1:32 5x7 3.5x4.0".split()
    assert lines[3].split() == "res3.1.conv2 1x1:112, 5x5:16 11x11 4.0x4.0".split()
    assert "height x width" in architecture.summary()
