"""How far networks see whose theoretical field is known; the box that holds a share of a field."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from oracles import build_plain
from torch import nn

from detectron2_nats import NATSError
from detectron2_nats.look.receptive_field import (
    central_rectangle,
    effective_receptive_fields,
    field_extents,
    mirrored,
)


def stack(*dilations, weight=1.0):
    """3×3 convs of one channel, all weights equal: the field is known."""
    convs = []
    for dilation in dilations:
        conv = nn.Conv2d(1 if convs else 3, 1, 3, padding=dilation, dilation=dilation, bias=False)
        nn.init.constant_(conv.weight, weight)
        convs.append(conv)
    return nn.Sequential(*convs)


def seen(*dilations):
    extent = field_extents(stack(*dilations), [torch.rand(3, 64, 64)])["output"]
    assert not extent.cut
    return extent.height, extent.width


def test_the_box_grows_with_d_in_its_direction_only():
    extents = {d: seen((1, 1), d, d, d) for d in [(1, 1), (1, 3), (1, 7), (3, 1), (7, 1), (7, 7)]}
    heights, widths = ({d: e[axis] for d, e in extents.items()} for axis in (0, 1))
    assert widths[1, 1] < widths[1, 3] < widths[1, 7]
    assert heights[1, 1] < heights[3, 1] < heights[7, 1]
    # not along the other side: the field is a product of its rows and columns
    assert heights[1, 1] == heights[1, 3] == heights[1, 7]
    assert widths[1, 1] == widths[3, 1] == widths[7, 1]
    assert heights[7, 7] == widths[7, 7] >= heights[7, 1] == widths[1, 7]


def test_one_conv_by_hand():
    # a conv's nine taps are equal: 90 % of them are all
    field = effective_receptive_fields(net := stack((2, 3)), torch.rand(1, 3, 32, 32), {"": net})
    places = np.argwhere(field["output"] > 0) - 16
    assert {tuple(p) for p in places} == {(h, w) for h in (-2, 0, 2) for w in (-3, 0, 3)}
    assert field["output"].max() == pytest.approx(1 / 9)
    assert seen((2, 3)) == (5, 7)


def test_rectangle_by_hand():
    field = np.zeros((9, 11))
    field[4, 5] = 0.5
    field[4, 8] = 0.45
    field[0, 5] = 0.05
    assert central_rectangle(field, 0.5) == (1, 1)
    assert central_rectangle(field, 0.9) == (1, 7)
    assert central_rectangle(field, 1.0) == (9, 7)
    assert central_rectangle(field.T, 0.9) == (7, 1)


def test_the_input_grows_until_the_field_fits():
    network = stack(*[(1, 64)] * 4)  # 513 wide in theory
    found = field_extents(network, [torch.rand(3, 40, 30)])["output"]
    assert 256 < found.width < 513 and found.height <= 9 and not found.cut
    small = field_extents(network, [torch.rand(3, 40, 30)], sides=[(256, 1)])["output"]
    assert small.cut and small.width <= 257
    assert str(small) == f"over {small.height} × {small.width}"


def test_an_fpn_sees_more_than_a_small_picture_shows():
    network = build_plain("FPN")
    found = field_extents(network, [torch.rand(3, 60, 80)], sides=[(128, 2), (256, 1), (512, 1)])
    assert list(found) == ["p2", "p3", "p4", "p5", "p6"]
    assert not any(extent.cut for extent in found.values())
    assert found["p6"] == found["p5"]  # every second position of it


def test_levels():
    network, image = torchvision.models.resnet18(), [torch.rand(3, 64, 64)]
    sides = [(64, 1)]
    assert list(field_extents(network, image, sides=sides)) == ["res2", "res3", "res4", "res5"]
    named = field_extents(network, image, ["layer1", "layer2.1.conv2"], sides)
    assert list(named) == ["layer1", "layer2.1.conv2"]

    class Returns(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.conv, self.kind = nn.Conv2d(3, 2, 3, padding=1), kind

        def forward(self, x):
            y = self.conv(x)
            return self.kind(y)

    for kind, names in (
        (lambda y: y, ["output"]),
        (lambda y: [y, y[..., ::2, ::2]], ["output 0", "output 1"]),
        (lambda y: OrderedDict(a=y, pooled=y.mean((2, 3), keepdim=True), scores=3), ["a"]),
        (lambda y: {"features": {"c4": y}}, ["c4"]),
    ):
        assert list(field_extents(Returns(kind), image, sides=sides)) == names
    for levels, words in (
        (["layer9"], "no such level: .*no attribute"),
        (["fc"], "no feature maps"),
    ):
        with pytest.raises(NATSError, match=words):
            field_extents(network, image, levels, sides)
    with pytest.raises(NATSError, match="no images"):
        field_extents(network, [])
    with pytest.raises(NATSError, match="no feature maps to look at: name --levels"):
        field_extents(Returns(lambda y: y.mean()), image, sides=sides)


def test_a_look_leaves_no_trace():
    network = torchvision.models.resnet18().train()
    network.bn1.eval()
    network.conv1.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    field_extents(network, [torch.rand(3, 50, 50)], sides=[(64, 2)])
    assert [n for n, m in network.named_modules() if not m.training] == ["bn1"]
    frozen = [n for n, p in network.named_parameters() if not p.requires_grad]
    assert frozen == ["conv1.weight"]
    assert all(p.grad is None for p in network.parameters())
    assert not any(m._forward_hooks for m in network.modules())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_mirrored():
    image = torch.arange(3.0).repeat(2, 4, 1)  # (2, 4, 3), a row is 0 1 2
    assert mirrored(image, 9)[0, 0].tolist() == [2, 1, 0, 0, 1, 2, 2, 1, 0]
    assert mirrored(image, 9).shape == (2, 9, 9)
    assert mirrored(torch.arange(7.0).repeat(1, 7, 1), 3)[0, 0].tolist() == [2, 3, 4]
