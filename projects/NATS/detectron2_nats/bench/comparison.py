"""Compare architectures over seeds and folds: data splits, reference architectures, statistics."""

import contextlib
import io
import itertools
import json
import math
import os
from collections import Counter
from typing import Any, Dict, Mapping, Sequence, Tuple

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import stats

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone

from ..errors import NATSError
from ..files import write_atomically
from ..method.architecture import Architecture, decode_alpha
from ..method.layers import MixedDilationConv2d
from ..method.search_space import Dilation
from ..method.stages import searched_layers

# -- data: folds ---------------------------------------------------------------------------------


def merged_annotations(paths: Sequence[str]) -> Dict[str, Any]:
    """Merge several COCO annotation files. Images and annotations get new ids.

    Raises:
        NATSError: a file is not in COCO's format, categories differ, or an image is in two files.
    """
    merged: Dict[str, Any] = {"images": [], "annotations": [], "categories": None}
    files = set()
    for path in paths:
        try:
            with open(path) as file:
                content = json.load(file)
            categories = [{"id": c["id"], "name": c["name"]} for c in content["categories"]]
            if merged["categories"] not in (None, categories):
                raise NATSError(f"{path}: its categories differ from those of {paths[0]}")
            merged["categories"] = categories
            new_ids = {}
            for image in content["images"]:
                if image["file_name"] in files:
                    raise NATSError(f"{path}: {image['file_name']} is in two files")
                files.add(image["file_name"])
                new_ids[image["id"]] = len(merged["images"]) + 1
                merged["images"].append({**image, "id": new_ids[image["id"]]})
            for annotation in content["annotations"]:
                image_id = new_ids[annotation["image_id"]]
                new = {"id": len(merged["annotations"]) + 1, "image_id": image_id}
                merged["annotations"].append({**annotation, **new})
        except OSError as error:
            raise NATSError(f"{path}: {error.strerror or error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise NATSError(f"{path}: not COCO's annotation format ({error!r})") from None
    return merged


def write_folds(annotations: Mapping[str, Any], folds: int, folder: str) -> None:
    """Write all.json, and FOLDER/fold_K/{test,train,calibration,rest}.json for each fold K.

    Every image is in the test split of exactly one fold. `rest` is all other images of a fold, on
    which a detector is retrained. For a search, `calibration` is 30 % of `rest` and `train` the
    remainder. The same input gives the same files.

    Raises:
        NATSError: there are fewer than three images per fold.
    """
    images = list(annotations["images"])
    if len(images) < 3 * folds:
        raise NATSError(f"{len(images)} images are too few for {folds} folds")
    order = np.random.default_rng(0).permutation(len(images))
    write_atomically(os.path.join(folder, "all.json"), json.dumps(annotations))
    for fold in range(folds):
        test = [i for place, i in enumerate(order) if place % folds == fold]
        rest = [i for place, i in enumerate(order) if place % folds != fold]
        cut = max(1, round(0.3 * len(rest)))
        for name, chosen in {
            "test": test,
            "rest": rest,
            "calibration": rest[:cut],
            "train": rest[cut:],
        }.items():
            kept = [images[i] for i in sorted(chosen)]
            ids = {image["id"] for image in kept}
            content = {
                "images": kept,
                "annotations": [a for a in annotations["annotations"] if a["image_id"] in ids],
                "categories": annotations["categories"],
            }
            path = os.path.join(folder, f"fold_{fold}", f"{name}.json")
            write_atomically(path, json.dumps(content))


def pooled_ap(annotation_file: str, result_files: Sequence[str]) -> float:
    """AP, in percent, of the detections of all folds together; each image was tested once."""
    detections = []
    for path in result_files:
        with open(path) as file:
            detections += json.load(file)
    if not detections:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotation_file)
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[0])


# -- architectures ---------------------------------------------------------------------------------


def random_architecture(cfg: CfgNode, seed: int, uneven: bool = False) -> Architecture:
    """Draw a genotype for each channel group in the search space of `cfg`.

    Args:
        uneven: first draw the genotypes' probabilities in each layer, uniformly among all that add
            up to 1. Such architectures differ more from each other. Else all are equally probable.

    Returns:
        The architecture in voted order: groups keep their own channels.

    Raises:
        NATSError: `cfg` does not describe a super-network.
    """
    rng = np.random.default_rng(seed)
    layers = {}
    for name, conv in _searched(cfg).items():
        count = len(conv.genotypes)
        chances = rng.dirichlet(np.ones(count)) if uneven else None
        drawn = np.eye(count)[rng.choice(count, size=conv.num_groups, p=chances)]
        layers[name] = decode_alpha(drawn, conv.genotypes, conv.out_channels, "voted")
    return Architecture(layers, {"method": "random", "seed": seed})


def uniform_architecture(cfg: CfgNode, dilation: Dilation) -> Architecture:
    """One dilation in all convs that `cfg` searches; it need not be in the search space.

    Raises:
        NATSError: `cfg` does not describe a super-network, or the dilation is malformed.
    """
    convs = _searched(cfg)
    return Architecture({name: [(conv.out_channels, *dilation)] for name, conv in convs.items()})


def _searched(cfg: CfgNode) -> Dict[str, MixedDilationConv2d]:
    with torch.device("meta"):
        searched = searched_layers(build_backbone(cfg))
    if not searched:
        raise NATSError("the search config describes no super-network to draw architectures from")
    return searched


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


# -- statistics ------------------------------------------------------------------------------------


def paired_interval(differences: Sequence[float]) -> Tuple[float, float]:
    """Mean of paired differences, and half the width of its 95 % interval (Student's t)."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return float(values.mean()), math.inf
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean()), float(half)


def detectable_difference(differences: Mapping[str, Sequence[float]]) -> float:
    """The true difference that a comparison of this size would find with 80 % probability.

    For a two-sided t-test at 5 %.

    Args:
        differences: method → paired differences; the methods' variances are averaged.
    """
    counts = [len(d) for d in differences.values()]
    if not counts or min(counts) < 2:
        return math.inf
    count = min(counts)
    deviation = np.mean([np.var(d, ddof=1) for d in differences.values()]) ** 0.5
    quantiles = stats.t.ppf(0.975, count - 1) + stats.t.ppf(0.8, count - 1)
    return float(quantiles * deviation / count**0.5)
