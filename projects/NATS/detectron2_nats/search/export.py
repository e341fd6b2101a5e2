"""Turn an architecture into a plain config, and a super-network's weights into frozen ones."""

import os
from dataclasses import replace
from typing import Any, Dict, Mapping, Sequence

import torch

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone

from ..config import load_config
from ..errors import NATSError
from ..files import write_atomically, write_yaml
from ..method.architecture import Architecture
from ..method.names import named_convs
from ..method.search_space import stage_of
from ..method.transform import apply_architecture
from .folder import SearchFolder


def detector_of(folder: SearchFolder, path: str) -> CfgNode:
    """The config of the detector to export.

    Args:
        path: a file, a zoo name, or "" for that to which the search in `folder` gave its result.

    Raises:
        NATSError: it cannot be read, or `folder` is not a search's output folder.
    """
    if path:
        return load_config(path)
    if not folder.has("config.yaml"):
        where = folder.path or "."
        raise NATSError(f"{where} has no config.yaml: name the detector with --config-file")
    return retrain_config(folder.cfg)


def retrain_config(search: CfgNode, opts: Sequence[str] = ()) -> CfgNode:
    """The plain config that is to receive what a search finds: ``SEARCH.RETRAIN_CONFIG``.

    Args:
        opts: KEY VALUE pairs that change it.

    Raises:
        NATSError: it cannot be read.
    """
    other = search.SEARCH.RETRAIN_CONFIG
    try:
        cfg = load_config(other, opts) if other else searched_detector(search)
    except NATSError as error:
        raise NATSError(f"SEARCH.RETRAIN_CONFIG: {error}") from None
    cfg.OUTPUT_DIR = os.path.join(search.OUTPUT_DIR, "retrain")
    return cfg


def searched_detector(cfg: CfgNode) -> CfgNode:
    """The config of the detector that a search's config searches."""
    cfg = cfg.clone()
    cfg.defrost()
    defaults = load_config("")
    cfg.SEARCH, cfg.DATASETS.CALIBRATION = defaults.SEARCH, defaults.DATASETS.CALIBRATION
    for key in (
        "CONVS",
        "SPACE",
        "NUM_GROUPS",
        "CHANNELS_PER_GROUP",
        "SHARE_WEIGHTS",
        "SAMPLE",
    ):
        cfg.MODEL.NATS[key] = defaults.MODEL.NATS[key]
    return cfg


def export_config(base: CfgNode, architecture: Architecture) -> CfgNode:
    """A plain config: the detector `base` with the architecture in its backbone.

    Leaves out stages that the base's backbone does not build (C4 keeps res5 in its heads).

    Raises:
        NATSError: the architecture does not fit the base's backbone.
    """
    cfg = base.clone()
    cfg.defrost()
    if cfg.MODEL.BACKBONE.NAME != "build_nats_backbone":
        cfg.MODEL.NATS.BASE_BACKBONE = cfg.MODEL.BACKBONE.NAME
    plain = cfg.clone()
    plain.MODEL.BACKBONE.NAME = cfg.MODEL.NATS.BASE_BACKBONE
    with torch.device("meta"):  # shapes are enough to check that it fits
        backbone = build_backbone(plain)
    built = {stage_of(name) for name in named_convs(backbone)}
    layers = {
        k: v for k, v in architecture.layers.items() if not stage_of(k) or stage_of(k) in built
    }
    if not layers:
        raise NATSError(
            f"the architecture changes {architecture.stages}, the detector has {built - {''}}"
        )
    architecture = replace(architecture, layers=layers)
    apply_architecture(backbone, architecture)
    cfg.MODEL.BACKBONE.NAME = "build_nats_backbone"
    cfg.MODEL.NATS.ARCHITECTURE = architecture.to_config()
    return cfg


def write_config(cfg: CfgNode, path: str) -> None:
    """Write what differs from the defaults. Load it after ``get_cfg(); add_nats_config(cfg)``."""
    difference = settings_of(cfg)
    nats = difference.get("MODEL", {}).get("NATS", {})
    if "ARCHITECTURE" in nats:  # one line per layer, for readers
        nats["ARCHITECTURE"] = [tuple(layer) for layer in nats["ARCHITECTURE"]]
    comment = (
        "# A plain detector with searched dilations. Load it after: import detectron2_nats;\n"
        "# cfg = get_cfg(); detectron2_nats.add_nats_config(cfg)\n"
    )
    write_yaml(path, {"VERSION": 2, **difference}, comment)


def write_weights(
    weights: Mapping[str, torch.Tensor], architecture: Architecture, path: str
) -> None:
    """Write a frozen detector's weights as a file for ``MODEL.WEIGHTS``."""
    content = {"model": weights, "__author__": "detectron2-nats"}
    content["architecture"] = architecture.to_config()
    write_atomically(path, lambda file: torch.save(content, file))


def settings_of(cfg: CfgNode) -> Dict[str, Any]:
    """What differs from the defaults, as nested plain values."""
    return _difference(cfg, load_config(""))


def _difference(cfg: CfgNode, default: Mapping[str, Any]) -> Dict[str, Any]:
    difference: Dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            # other projects have nodes of their own, which the defaults lack
            inner = _difference(value, default.get(key, {}))
            if inner:
                difference[key] = inner
        elif key not in default or value != default[key]:
            difference[key] = value
    return difference
