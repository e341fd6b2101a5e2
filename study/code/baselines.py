"""Architectures to compare a search with, and how alike architectures are."""

import itertools
from collections import Counter
from typing import Dict, Sequence, Tuple

import numpy as np
import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone

from ..backbone import search_space_from_config
from ..errors import NATSError
from ..method.architecture import Architecture
from ..method.convs import searched_layers
from ..method.search_space import Dilation


def random_architecture(cfg: CfgNode, seed: int, uneven: bool = False) -> Architecture:
    """:meth:`.Architecture.random` of the super-network that `cfg` describes.

    Returns:
        The architecture in voted order: groups keep their own channels.

    Raises:
        NATSError: `cfg` does not describe a super-network.
    """
    return Architecture.random(_supernet(cfg), search_space_from_config(cfg), seed, uneven=uneven)


def uniform_architecture(cfg: CfgNode, dilation: Dilation) -> Architecture:
    """One dilation in all convs that `cfg` searches; it need not be in the search space.

    Raises:
        NATSError: `cfg` does not describe a super-network, or the dilation is malformed.
    """
    return Architecture.uniform(_supernet(cfg), dilation, **_searched(cfg))


def cycle_architecture(cfg: CfgNode) -> Architecture:
    """:meth:`.Architecture.cycle` of all convs that `cfg` searches."""
    return Architecture.cycle(_supernet(cfg), **_searched(cfg))


def sawtooth_architecture(cfg: CfgNode) -> Architecture:
    """:meth:`.Architecture.sawtooth` of all convs that `cfg` searches."""
    return Architecture.sawtooth(_supernet(cfg), **_searched(cfg))


def _searched(cfg: CfgNode) -> Dict[str, Sequence[str]]:
    space = search_space_from_config(cfg)
    return {"stages": space.stages, "convs": space.convs}


def _supernet(cfg: CfgNode) -> nn.Module:
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    if not searched_layers(backbone):
        raise NATSError("the search config describes no super-network to draw architectures from")
    return backbone


def dilation_shares(architectures: Sequence[Architecture]) -> Dict[Dilation, float]:
    """The share of all channels that has each dilation, most frequent first."""
    counts: Counter = Counter()
    for architecture in architectures:
        for name in architecture.layers:
            counts.update(architecture.channels_per_dilation(name))
    return {dilation: n / counts.total() for dilation, n in counts.most_common()}


def _per_channel(segments) -> np.ndarray:
    """(C_out,): each channel's dilation as one number."""
    return np.concatenate([np.full(channels, 65536 * d_h + d_w) for channels, d_h, d_w in segments])


def agreement(architectures: Sequence[Architecture]) -> Tuple[float, float]:
    """How many channels have the same dilation in two searches, mean over layers and pairs.

    Returns:
        The share of channels, and the share expected by chance if each layer keeps its number of
        channels per dilation. If both are equal, the searches agree on nothing but these numbers.
    """
    seen, chance = [], []
    for one, other in itertools.combinations(architectures, 2):
        for name in one.layers:
            a, b = _per_channel(one.layers[name]), _per_channel(other.layers[name])
            seen.append(float((a == b).mean()))
            chance.append(sum(float((a == d).mean() * (b == d).mean()) for d in np.unique(a)))
    return float(np.mean(seen)), float(np.mean(chance))
