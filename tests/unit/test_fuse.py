"""A fused network gives what the frozen one gave, without norms."""

import pytest
import torch
from oracles import build_plain, image, random_architecture, space_of
from torch import nn

from detectron2.layers import FrozenBatchNorm2d
from detectron2_nats import NATSError, apply_architecture, fuse_for_inference, to_supernet


def frozen(name):
    backbone = build_plain(name).double()
    return apply_architecture(backbone, random_architecture(name, backbone)).eval()


@pytest.mark.parametrize("name", ["R18", "FPN", "ResNeXt", "DC5"])
def test_same_outputs(name):
    network = frozen(name)
    with torch.no_grad():
        before = network(image(dtype=torch.float64))
        count = sum(p.numel() for n, p in network.named_parameters() if "norm" not in n)
        assert fuse_for_inference(network) is network
        after = network(image(dtype=torch.float64))
    for key, value in before.items():
        assert value.abs().max() > 1e-3
        torch.testing.assert_close(after[key], value, rtol=1e-9, atol=1e-9)
    weights = sum(p.numel() for n, p in network.named_parameters() if not n.endswith("bias"))
    assert weights <= count
    assert not [m for m in network.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))]


def test_fusing_twice_changes_nothing():
    network = fuse_for_inference(frozen("R50"))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    fuse_for_inference(network)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_refuses_training_mode_and_super_networks():
    with pytest.raises(NATSError, match="training mode"):
        fuse_for_inference(frozen("R50").train())
    supernet = to_supernet(build_plain("R50"), space_of("R50"))
    with pytest.raises(NATSError, match="super-network"):
        fuse_for_inference(supernet)
