"""Collect the results of a study's runs."""

import functools
import itertools
import os
import statistics
from typing import Any, Dict, List, NamedTuple, Optional

import torch

from detectron2.data import build_detection_test_loader
from detectron2.modeling import build_model

from ...config import load_config
from ...config.comparing import falls_back_to_cpu
from ...data.registry import register_datasets
from ...errors import NATSError
from ...search.folder import SearchFolder
from ..cost import Cost, backbone_cost, interleaved_seconds
from .folds import pooled_ap
from .methods import Method
from .metrics import last_metric, per_class
from .plan import Study
from .runs import Task
from .trials import trials_of


def collect(study: Study) -> Dict[str, Any]:
    """The results of all seeds for which all methods are done, as plain values.

    Raises:
        NATSError: there is no such seed.
    """
    seeds = [s for s in study.seeds if all(study.task(m.name, s).done for m in study.methods)]
    if not seeds:
        raise NATSError(f"{study.settings.output}: no seed has results of all methods yet")
    costs = _network_costs(study, seeds[0])
    reference = costs[study.methods[0].name].seconds
    methods = {}
    for method in study.methods:
        cost = costs[method.name]
        folders = [study.folder(method.name, seed) for seed in seeds]
        architectures = [study.architecture(method, seed) for seed in seeds]
        methods[method.name] = {
            "AP": [last_metric(folder, "bbox/AP") for folder in folders],
            "AP50": [last_metric(folder, "bbox/AP50") for folder in folders],
            "AP75": [last_metric(folder, "bbox/AP75") for folder in folders],
            "classes": per_class(folders),
            "pooled": _pooled(study, method, seeds),
            "parameters": cost.backbone.parameters,
            "flops": cost.backbone.flops,
            "milliseconds": 1e3 * statistics.median(cost.seconds),
            "time_ratio": statistics.median(
                own / plain for own, plain in zip(cost.seconds, reference)
            ),
            **_spent([study.task(method.name, seed) for seed in seeds]),
            "architectures": [a.to_config() if a else None for a in architectures],
        }
    searches = {}
    for name in ("path", "nats"):
        tasks = [study.task(f"search-{name}", seed) for seed in seeds]
        if all(tasks):
            found = [SearchFolder(task.folder).decode("voted") for task in tasks]
            searches[name] = {
                "entropy": [last_metric(task.folder, "alpha/entropy") for task in tasks],
                "leading": [last_metric(task.folder, "alpha/leading") for task in tasks],
                **_spent(tasks),
                "architectures": [architecture.to_config() for architecture in found],
            }
    return {"seeds": seeds, "methods": methods, "searches": searches}


def _spent(tasks: List[Task]) -> Dict[str, List[float]]:
    """What runs took, each with the trials before it."""
    spent = [[part.cost() for part in (task, *trials_of(task))] for task in tasks]
    return {
        "cpu_seconds": [sum(cost["cpu_seconds"] for cost in parts) for parts in spent],
        "lost_starts": [sum(cost["lost"] for cost in parts) for parts in spent],
    }


def _pooled(study: Study, method: Method, seeds: List[int]) -> Optional[float]:
    """AP of all folds together, mean over rounds; None without folds or a complete round."""
    folds = study.settings.folds
    rounds = [range(r, r + folds) for r in range(0, study.seeds.stop, folds)] if folds else []
    rounds = [r for r in rounds if set(r) <= set(seeds)]
    if not rounds:
        return None
    name = os.path.join("inference", "coco_instances_results.json")
    return statistics.mean(
        pooled_ap(
            study.path("data", "all.json"),
            [os.path.join(study.folder(method.name, s), name) for s in r],
        )
        for r in rounds
    )


class _Costs(NamedTuple):
    """What a method's backbone costs for an image: counts, and seconds in each round."""

    backbone: Cost
    seconds: List[float]


def _network_costs(study: Study, seed: int) -> Dict[str, _Costs]:
    """Of each method's backbone of one seed; they are timed in turn."""
    counts, functions, images = {}, [], None
    for name in (method.name for method in study.methods):
        cfg = load_config(os.path.join(study.folder(name, seed), "config.yaml"))
        falls_back_to_cpu(cfg)
        register_datasets(cfg)
        if images is None:
            loader = build_detection_test_loader(cfg, cfg.DATASETS.TEST[0])
            images = list(itertools.islice(loader, 4))
        model = build_model(cfg).eval()
        height, width = (-(-side // 32) * 32 for side in images[0][0]["image"].shape[-2:])
        counts[name] = backbone_cost(model.backbone, height, width)
        functions.append(functools.partial(_backbones, model, images))
    seconds = interleaved_seconds(functions, rounds=9)
    return {
        name: _Costs(counts[name], [value / len(images) for value in values])
        for name, values in zip(counts, seconds)
    }


@torch.no_grad()
def _backbones(model: torch.nn.Module, images: list) -> None:
    for batch in images:
        model.backbone(model.preprocess_image(batch).tensor)
