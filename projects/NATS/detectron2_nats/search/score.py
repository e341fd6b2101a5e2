"""Does a wider field pay? Score architectures with the super-network that they come from.

If α is one-hot, each channel group of the super-network uses one replica. The super-network then
computes what the decoded network with the super-network's own weights would. Its loss on images
that these weights were not trained on is the one-shot score. study/README.md says what it
predicts.
"""

import contextlib
import copy
import logging
import time
from typing import Dict, Iterator, List, Mapping, Sequence
from unittest import mock

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.utils.events import EventStorage

from ..backbone import search_space_from_config
from ..data.registry import check_data, register_datasets
from ..engine.loader import dataset_dicts
from ..errors import NATSError, one_line
from ..method.architecture import Architecture
from ..method.layers import MixedDilationConv2d
from ..method.names import searched_layers
from .folder import SearchFolder

logger = logging.getLogger(__name__)

_DRAWS = 6
"""Random architectures in a report. In the measured cases the verdict on six was that on all."""


def score_folder(folder: SearchFolder, images: int) -> str:
    """:func:`score_report` of a search that has ended.

    Raises:
        NATSError: there is no checkpoint, or its weights suit nothing but what was frozen.
    """
    cfg = folder.cfg
    register_datasets(cfg)
    check_data(cfg, ["CALIBRATION"])
    model = folder.detector
    if any(getattr(conv, "settled", None) for conv in searched_layers(model).values()):
        raise NATSError(
            f"{folder.path} went on to train what it found, and its weights suit nothing else: "
            "log.txt has the scores of the moment before, if SEARCH.SCORE_IMAGES was not 0"
        )
    return score_report(cfg, model, images)


def score_report(cfg: CfgNode, model: nn.Module, images: int, processes: int = 1) -> str:
    """A table of losses, of the found architecture and of those that need no search; a verdict.

    Args:
        cfg: the search's config.
        model: its detector; it is not changed.
        images: calibration images to use, at most.
        processes: of the search.
    """
    start = time.perf_counter()
    records = some_of(dataset_dicts(cfg, cfg.DATASETS.CALIBRATION), images)
    batches = scoring_batches(cfg, records, processes)
    scores = {
        name: one_shot_score(model, architecture, batches)
        for name, architecture in candidates(cfg, model, _DRAWS).items()
    }
    table = tabulate(sorted(scores.items(), key=lambda s: s[1]), ["", "loss"], floatfmt=".4f")
    took = time.perf_counter() - start
    return (
        f"Losses on {len(records)} calibration images, with the super-network's own weights, "
        f"which suit what was found ({took:.0f} s):\n{table}\n{field_verdict(scores)}"
    )


def candidates(cfg: CfgNode, model: nn.Module, draws: int) -> Dict[str, Architecture]:
    """What a search is compared with: name → architecture, in voted order.

    They are "found", "plain", one dilation everywhere ("all 3x3"), of those that all convs may
    have, and "random 0" and so on.

    Args:
        cfg: the search's config.
        model: its detector.
        draws: number of random ones.
    """
    searched, space = searched_layers(model), search_space_from_config(cfg)
    backbone = getattr(model, "backbone", model)
    architectures = {"found": Architecture.decode(model, "voted")}
    spaces = [set(conv.genotypes) for conv in searched.values()]
    for h, w in sorted(set.intersection(*spaces)):
        name = "plain" if h == w == 1 else f"all {h}x{w}"
        architectures[name] = Architecture.uniform(backbone, (h, w), space.convs)
    for seed in range(draws):
        architectures[f"random {seed}"] = Architecture.random(backbone, space, seed)
    return architectures


def one_shot_score(
    model: nn.Module, architecture: Architecture, batches: Sequence[List[dict]]
) -> float:
    """Mean loss of the decoded network with the super-network's own weights.

    Batch norms use each batch's statistics. The regions that a detector samples for its losses are
    the same for all architectures.

    Args:
        model: a searched detector; it is not changed.
        architecture: of its search space, in voted order, which alone fits its weights.
        batches: lists of mapped samples with boxes.
    """
    model = copy.deepcopy(model).train()  # a forward pass changes only the copy
    devices = range(torch.cuda.device_count()) if next(model.parameters()).is_cuda else []
    losses = []
    with _alone(), torch.no_grad(), EventStorage(), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        for name, conv in searched_layers(model).items():
            conv.alpha.copy_(_one_hot_alpha(architecture, name, conv))
            conv.training = False  # votes instead of drawing, which would take random numbers
        for batch in batches:
            losses.append(float(sum(model(batch).values())))
    return float(np.mean(losses))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """In the block, this process of a group computes alone: no norm waits for the other ranks."""
    with mock.patch.object(torch.distributed, "is_initialized", return_value=False):
        yield


def field_verdict(scores: Mapping[str, float]) -> str:
    """Whether a wider field pays, in a sentence.

    Args:
        scores: of :func:`candidates`, at least one of them random. Nearly all of these see further.
    """
    plain = scores["plain"]
    drawn = [score for name, score in scores.items() if name.startswith("random ")]
    worse = sum(plain > score for score in drawn)
    if worse == len(drawn):
        verdict = "a wider field pays"
    elif worse <= len(drawn) / 2:
        verdict = "a wider field does not pay"
    else:
        verdict = "this does not tell whether a wider field pays"
    return f"Plain has a higher loss than {worse} of {len(drawn)} random architectures: {verdict}."


def some_of(records: Sequence[dict], count: int) -> Sequence[dict]:
    """At most `count` of them, evenly spread."""
    return records[:: -(-len(records) // count)]


def scoring_batches(cfg: CfgNode, records: Sequence[dict], processes: int = 1) -> List[List[dict]]:
    """Images at test size, with their boxes, in batches of ``SOLVER.IMS_PER_BATCH``.

    Args:
        processes: of the search; the batches are those of one of them, which fit into its memory.
    """
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    mapper = DatasetMapper(cfg, is_train=True, augmentations=[resize])
    samples = []
    for record in records:
        try:
            samples.append(mapper(record))
        except Exception as error:  # Pillow raises all kinds of errors for a damaged file
            logger.warning(f"no score on {record['file_name']}: {one_line(error)}")
    if not samples:
        raise NATSError("no score: no image can be read, the log names them")
    size = max(1, cfg.SOLVER.IMS_PER_BATCH // processes)
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def _one_hot_alpha(
    architecture: Architecture, layer: str, conv: MixedDilationConv2d
) -> torch.Tensor:
    """One conv's α for an architecture, (N, G): 0 for a group's genotype, -inf for the others."""
    dilations = [tuple(d) for c, *d in architecture.layers[layer] for _ in range(c)]
    alpha = torch.full((conv.num_groups, len(conv.genotypes)), -torch.inf)
    for group, dilation in enumerate(dilations[:: conv.out_channels // conv.num_groups]):
        alpha[group, conv.genotypes.index(dilation)] = 0
    return alpha
