"""A network of any library on its way: searched, α trained, decoded, saved, frozen."""

import copy

import torch

from detectron2_nats import (
    Architecture,
    alpha_parameters,
    alpha_training,
    apply_architecture,
    frozen_state_dict,
    to_supernet,
)
from detectron2_nats.method.names import searched_layers

# of torchvision's heads, which take a list of maps
_WIDTHS = {
    "SSDHead": [512, 1024, 512, 256, 256, 256],
    "SSDLiteHead": [672, 480, 512, 256, 256, 128],
    "FCOSHead": [256, 256],
    "RetinaNetHead": [256, 256],
}


def flat_outputs(network):
    """What a network returns for two random images, as one list; a head's, for random maps."""
    generator = torch.Generator().manual_seed(0)
    widths = _WIDTHS.get(type(network).__name__)
    if widths:
        outputs = network([torch.randn(2, c, 6, 6, generator=generator) for c in widths])
    else:
        outputs = network(torch.randn(2, 3, 64, 64, generator=generator))
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    parts = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return [part for part in parts if torch.is_tensor(part) and part.is_floating_point()]


def check_searched_and_frozen(build, space):
    """Search `build()`, and freeze it: equal outputs at both ends. Returns the super-network."""
    torch.manual_seed(0)
    plain = build().eval()
    keys = {k: v.shape for k, v in plain.state_dict().items()}
    with torch.no_grad():
        expected = flat_outputs(plain)
    supernet = to_supernet(copy.deepcopy(plain), space)
    with torch.no_grad():  # α = 0: the plain network, bit for bit where (1, 1) alone is computed
        for ours, theirs in zip(flat_outputs(supernet.eval()), expected, strict=True):
            assert torch.equal(ours, theirs) or not space.sample
    supernet.train()
    before = {k: v.clone() for k, v in supernet.state_dict().items()}
    adam = torch.optim.Adam(alpha_parameters(supernet), lr=1.0)
    with alpha_training(supernet):
        sum(y.square().sum() for y in flat_outputs(supernet)).backward()
        adam.step()
    changed = [k for k, v in supernet.state_dict().items() if not torch.equal(v, before[k])]
    assert changed and all(key.endswith(".alpha") for key in changed)
    for index, conv in enumerate(searched_layers(supernet).values()):
        assert conv.alpha.isfinite().all()
        votes = torch.randint(conv.alpha.shape[1], (len(conv.alpha), 1))
        conv.alpha.data.fill_(-1e4).scatter_(1, votes, 1e4)
        if conv.replicas is not None:  # or nobody would notice whose they are
            conv.replicas.data.mul_(0.5 + 0.1 * index)
    supernet.eval()

    architecture = Architecture.decode(supernet, "voted")
    weights = frozen_state_dict(supernet, architecture)
    frozen, undilated = build().eval(), build().eval()
    apply_architecture(frozen, architecture)
    for network in (frozen, undilated):
        assert {k: v.shape for k, v in network.state_dict().items()} == keys
        network.load_state_dict(weights)
    with torch.no_grad():
        searched, plain = flat_outputs(supernet), flat_outputs(undilated)
        for ours, theirs in zip(flat_outputs(frozen), searched, strict=True):
            scale = theirs.abs().max().clamp(min=1e-30)  # random weights may give 1e-10
            torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-4, atol=1e-5)
        assert any((a - b).abs().max() > 1e-3 * b.abs().max() for a, b in zip(plain, searched))
    return supernet
