"""Draw an architecture instead of searching it: at random, one dilation everywhere, or in turns.

Each function gives the layers of an :class:`.Architecture`, for every conv of the stages or
patterns that are asked for. The network's weights are not looked at: it may be on the meta device.
"""

from typing import Any, Dict, Mapping, Sequence, Tuple

import numpy as np
from torch import nn

from ..errors import NATSError, shown
from .convs import matching_convs
from .search_space import Dilation, SearchSpace, check_dilation, checked_patterns
from .stages import conv3x3_layers

CYCLE = ((1, 1), (2, 2), (1, 1), (4, 4))
"""PSConv's dilations (Li et al., ECCV 2020)."""

SAWTOOTH = ((1, 1), (2, 2), (3, 3))
"""The dilations of hybrid dilated convolution (Wang et al., WACV 2018)."""

Layers = Dict[str, Tuple[Tuple[int, int, int], ...]]
"""Layer name → segments."""


def random_layers(
    network: nn.Module, space: SearchSpace, seed: int, plain: float, uneven: bool
) -> Layers:
    """See :meth:`.Architecture.random`."""
    if not 0 <= plain <= 1:
        raise NATSError(f"share of plain groups {shown(plain)}: expected 0 to 1")
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, conv in _convs(network, space.stages, space.convs).items():
        genotypes = space.genotypes_of(name, conv.kernel_size)
        num_groups = space.groups_of(name, conv.out_channels, conv.groups)
        chances = rng.dirichlet(np.ones(len(genotypes))) if uneven else None
        chosen = rng.choice(len(genotypes), size=num_groups, p=chances)
        drawn[name] = np.asarray(genotypes)[chosen]  # (N, 2)
    # A generator of its own: the groups that do not stay plain have what they have without it.
    # Over all groups, because a conv may have a single one.
    total = sum(map(len, drawn.values()))
    stay = np.random.default_rng([seed, 1]).permutation(total) < round(plain * total)
    layers, first = {}, 0
    for name, conv in _convs(network, space.stages, space.convs).items():
        count = len(drawn[name])
        drawn[name][stay[first : first + count]] = 1
        first += count
        channels = conv.out_channels // count
        layers[name] = tuple((channels, int(d_h), int(d_w)) for d_h, d_w in drawn[name])
    return layers


def uniform_layers(
    network: nn.Module, dilation: Dilation, stages: Sequence[str], convs: Sequence[str] = ()
) -> Layers:
    """See :meth:`.Architecture.uniform`."""
    dilation = check_dilation(dilation)
    return {
        name: ((conv.out_channels, *dilation),)
        for name, conv in _convs(network, stages, convs).items()
    }


def cycle_layers(
    network: nn.Module,
    dilations: Sequence[Dilation],
    stages: Sequence[str],
    convs: Sequence[str] = (),
) -> Layers:
    """See :meth:`.Architecture.cycle`."""
    dilations = check_dilations(dilations)
    layers = {}
    for name, conv in _convs(network, stages, convs).items():
        # a conv group (ResNeXt) reads its own input channels and must stay whole
        unit = conv.out_channels // conv.groups if conv.groups > 1 else 1
        turns = range(conv.out_channels // unit)
        layers[name] = tuple((unit, *dilations[i % len(dilations)]) for i in turns)
    return layers


def sawtooth_layers(
    network: nn.Module,
    dilations: Sequence[Dilation],
    stages: Sequence[str],
    convs: Sequence[str] = (),
) -> Layers:
    """See :meth:`.Architecture.sawtooth`."""
    dilations = check_dilations(dilations)
    return {
        name: ((conv.out_channels, *dilations[i % len(dilations)]),)
        for i, (name, conv) in enumerate(_convs(network, stages, convs).items())
    }


def check_dilations(dilations: Any) -> Tuple[Dilation, ...]:
    """One or more dilation pairs, or :class:`NATSError`."""
    if not isinstance(dilations, (list, tuple)) or not dilations:
        raise NATSError(
            f"{shown(dilations)}: expected a list of dilation pairs, such as [(1, 1), (2, 2)]"
        )
    return tuple(check_dilation(dilation) for dilation in dilations)


def as_text(dilations: Sequence[Dilation]) -> str:
    """How nats-draw is told of them: "1x1,2x2"."""
    return ",".join(f"{d_h}x{d_w}" for d_h, d_w in dilations)


def _convs(
    network: nn.Module, stages: Sequence[str], convs: Sequence[str]
) -> Mapping[str, nn.Conv2d]:
    """Layer name → conv of the patterns, or of the stages, in order of depth."""
    if convs:
        return matching_convs(network, checked_patterns(convs))[0]
    if not stages or isinstance(stages, str):
        raise NATSError(f"stages {shown(stages)}: expected a list, such as ['res3', 'res4']")
    layers = conv3x3_layers(network)
    built = dict.fromkeys(name.split(".")[0] for name in layers)
    missing = [stage for stage in stages if stage not in built]
    if missing:
        raise NATSError(
            f"stage {shown(missing[0])} is missing, or has no plain 3x3 conv: choose among "
            f"{', '.join(built) or 'none'}"
        )
    return {name: conv for name, conv in layers.items() if name.split(".")[0] in stages}
