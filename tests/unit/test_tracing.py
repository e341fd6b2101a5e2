"""What other tools do to a network whose convs were replaced: trace, hook, parametrise."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnext50_32x4d
from torchvision.models.feature_extraction import create_feature_extractor

from detectron2_nats import (
    Architecture,
    SearchSpace,
    alpha_parameters,
    apply_architecture,
    to_supernet,
)

SPACE = SearchSpace("C", ["res3.*", "res4.*"])


def drawn(network, seed=0):
    """An architecture with several dilations in each conv."""
    supernet = to_supernet(copy.deepcopy(network), SPACE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for alpha in alpha_parameters(supernet):
            alpha.copy_(torch.randn(alpha.shape, generator=generator))
    return Architecture.decode(supernet, "voted")


@pytest.fixture(scope="module", params=[resnet18, resnext50_32x4d])
def frozen(request):
    network = request.param(weights=None)
    return apply_architecture(network, drawn(network)).eval()


@torch.no_grad()
def test_fx_traces_a_frozen_network(frozen):
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(torch.fx.symbolic_trace(frozen)(x), frozen(x))
    features = create_feature_extractor(frozen, {"layer3": "features"})(x)["features"]
    at = {}
    frozen.layer3.register_forward_hook(lambda m, i, y: at.update(features=y))
    frozen(x)
    assert torch.equal(features, at["features"])


@torch.no_grad()
def test_conv_forward_is_the_dilated_conv(frozen):
    """mmcv calls it with a weight that contains the batch norm."""
    conv = next(m for m in frozen.modules() if type(m).__name__ == "GroupedDilationConv2d")
    x = torch.randn(1, conv.in_channels, 24, 24)
    assert torch.equal(conv._conv_forward(x, 2 * conv.weight, None), 2 * conv(x))


@pytest.mark.parametrize("how", ["mixed", "sampled", "frozen"])
def test_hooks_stay_and_can_be_removed(how):
    network, calls = resnet18(weights=None), []
    conv = network.layer2[1].conv2
    handles = [
        conv.register_forward_hook(lambda m, i, y: calls.append(("after", tuple(y.shape)))),
        conv.register_forward_pre_hook(lambda m, i: calls.append("before")),
        conv.register_full_backward_hook(lambda m, i, o: calls.append("backward")),
    ]
    if how == "frozen":
        apply_architecture(network, drawn(network))
    else:
        to_supernet(network, SearchSpace("C", ["res3.*"], sample=how == "sampled"))
    assert network.layer2[1].conv2 is conv and type(conv) is not nn.Conv2d
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    assert calls == ["before", ("after", (2, 128, 4, 4)), "backward"]
    for handle in handles:
        handle.remove()
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(calls) == 3
