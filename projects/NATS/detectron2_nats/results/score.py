"""Is it worth retraining? Score architectures with the super-network that they come from.

If α is one-hot, each channel group of the super-network uses one replica. The super-network then
computes what the decoded network with the super-network's own weights would. Its loss on images
that these weights were not trained on is the architecture's one-shot score. docs/study.md says how
well it predicts the AP after retraining.
"""

import copy
from typing import Dict, List, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.utils.events import EventStorage

from ..architecture import Architecture
from ..errors import NATSError
from ..layers import MixedDilationConv2d
from ..transform import searched_layers

__all__ = ["knock_out_score", "one_hot_alpha", "one_shot_score", "scoring_batches"]


def one_shot_score(
    model: nn.Module, architecture: Architecture, batches: Sequence[List[dict]]
) -> float:
    """Mean loss of the decoded network with the super-network's own weights.

    Batch norms use each batch's statistics. The regions that a detector samples for its losses are
    the same for all architectures.

    Args:
        model: a searched detector; it is not changed.
        architecture: in voted order, the only one that the super-network's weights fit.
        batches: lists of mapped samples with boxes.

    Raises:
        NATSError: the architecture is not in this super-network's search space.
    """
    return _loss(model, _one_hot_alphas(model, architecture), batches)


def knock_out_score(
    model: nn.Module, architecture: Architecture, batches: Sequence[List[dict]]
) -> float:
    """The loss when one layer is decoded and the others are as in the search, mean over the layers.

    They are mixtures, or draws (``MODEL.NATS.SAMPLE``), which are the same for all architectures.
    """
    alphas = _one_hot_alphas(model, architecture)
    return float(np.mean([_loss(model, {n: alpha}, batches) for n, alpha in alphas.items()]))


def scoring_batches(cfg: CfgNode, records: Sequence[dict]) -> List[List[dict]]:
    """Images at test size, with their boxes, in batches of ``SOLVER.IMS_PER_BATCH``."""
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    mapper = DatasetMapper(cfg, is_train=True, augmentations=[resize])
    samples, size = [mapper(record) for record in records], cfg.SOLVER.IMS_PER_BATCH
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def one_hot_alpha(
    architecture: Architecture, layer: str, conv: MixedDilationConv2d
) -> torch.Tensor:
    """One conv's α for an architecture, (N, G): 0 for a group's genotype, -inf for the others."""
    dilations = [tuple(d) for c, *d in architecture.layers.get(layer, ()) for _ in range(c)]
    if len(dilations) != conv.out_channels:
        raise NATSError(
            f"{layer}: {len(dilations)} channels in the architecture, not {conv.out_channels}"
        )
    per_group = conv.out_channels // conv.num_groups
    alpha = torch.full((conv.num_groups, len(conv.genotypes)), -torch.inf)
    for group in range(conv.num_groups):
        given = set(dilations[group * per_group : (group + 1) * per_group])
        if len(given) > 1 or not given <= set(conv.genotypes):
            raise NATSError(
                f"{layer}: the architecture gives channel group {group} the dilations "
                f"{sorted(given)}, the search one of {list(conv.genotypes)}"
            )
        alpha[group, conv.genotypes.index(given.pop())] = 0
    return alpha


def _one_hot_alphas(model: nn.Module, architecture: Architecture) -> Dict[str, torch.Tensor]:
    searched = searched_layers(model)
    return {name: one_hot_alpha(architecture, name, conv) for name, conv in searched.items()}


def _loss(
    model: nn.Module, alphas: Mapping[str, torch.Tensor], batches: Sequence[List[dict]]
) -> float:
    """Mean total loss with these α; other layers keep theirs."""
    model = copy.deepcopy(model).train()  # a forward pass changes only the copy
    searched = searched_layers(model)
    devices = range(torch.cuda.device_count()) if next(model.parameters()).is_cuda else []
    losses = []
    with torch.no_grad(), EventStorage(), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        for name, alpha in alphas.items():
            searched[name].alpha.copy_(alpha)
        for batch in batches:
            losses.append(float(sum(model(batch).values())))
    return float(np.mean(losses))
