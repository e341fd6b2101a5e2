"""Weights and proposals from elsewhere: read them, and check that they suit a config."""

import logging
import os
import pickle
import re
from typing import Any, Dict, Mapping, Sequence

import torch

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..config.keys import flat
from ..errors import NATSError, one_line
from ..method.architecture import Architecture

logger = logging.getLogger(__name__)


def fetched(path: str) -> str:
    """The local path of a file; one of https:// or detectron2:// is downloaded, once."""
    try:
        return PathManager.get_local_path(path)
    except NATSError:
        raise
    except Exception as error:  # no network, no such file, no room
        raise NATSError(
            f"weights {path}: cannot be fetched ({one_line(error)}). Fetch them elsewhere, and set "
            "MODEL.WEIGHTS to the file"
        ) from None


def read_arrays(filename: str, what: str) -> Dict[str, Any]:
    """Read a pickle of NumPy arrays and plain types. No code in it is executed.

    Args:
        what: it should hold, such as "weights".

    Raises:
        NATSError: it holds anything else.
    """
    with PathManager.open(filename, "rb") as file:
        try:
            content = _ArrayUnpickler(file, encoding="latin1").load()
        except Exception as error:  # unpicklers raise all kinds of errors for other files
            raise NATSError(f"{filename}: not readable as {what}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise NATSError(f"{filename}: not readable as {what}: it contains no dict")
    return content


def check_proposals(cfg: CfgNode, files: Sequence[str]) -> None:
    """Check files of proposals, which Detectron2 unpickles, and would execute code from."""
    for path in files if cfg.MODEL.LOAD_PROPOSALS else ():
        if os.path.isfile(path):
            read_arrays(path, "proposals")


def read_pkl(filename: str) -> Dict[str, Any]:
    """Read a `.pkl` of Detectron2's or Caffe2's model zoo; its content tells which."""
    content = read_arrays(filename, "weights")
    if "model" in content and "__author__" in content:
        return content
    blobs = content.get("blobs", content)
    blobs = {key: value for key, value in blobs.items() if not key.endswith("_momentum")}
    return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays and plain types, and executes no code."""

    ALLOWED = {
        ("collections", "OrderedDict"),
        ("_codecs", "encode"),
        ("detectron2.structures.boxes", "BoxMode"),  # in files of proposals
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    }

    def find_class(self, module: str, name: str):
        reconstructs = re.fullmatch(r"numpy\.(_?core)\.multiarray", module)
        if (module, name) in self.ALLOWED or (reconstructs and name in ("_reconstruct", "scalar")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"it contains {module}.{name}, not only arrays and plain types"
        )


def from_torchvision(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Rename a torchvision ResNet's weights to Detectron2's names.

    See :func:`warn_of_torchvision` for what a config must say.
    """
    renamed = {}
    for key, value in state_dict.items():
        if not key.startswith("layer"):
            key = "stem." + key
        key = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", key)
        key = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", key)
        key = key.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
        if "fc." not in key and not key.endswith("num_batches_tracked"):
            renamed[key] = value
    return renamed


def warn_of_torchvision(cfg: CfgNode) -> None:
    """Name the keys that do not fit torchvision's weights, with which a detector trains badly."""
    fitting = {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    }
    values = flat(cfg)
    words = [f'{key} "{value}"' for key, value in fitting.items() if values[key] != value]
    if words:
        logger.warning(f"these are torchvision's weights: set {' '.join(words)}")


def check_same_dilations(cfg: CfgNode, loaded: Mapping[str, Any], weights: str) -> None:
    """Check that a trained detector had the dilations that a config gives it.

    Names and shapes of its weights fit any dilations, and under others it detects badly.

    Args:
        loaded: what its file holds besides the weights. Only this project's files tell.
        weights: the file, for the message.

    Raises:
        NATSError: it had others.
    """
    trained = None
    if "computed_by" in loaded:  # a run's checkpoint
        trained = _dilations(CfgNode.load_cfg(loaded["config"]))
    elif loaded.get("__author__") == "detectron2-nats" and "architecture" in loaded:
        trained = _changed(loaded["architecture"])
    if trained is not None and trained != _dilations(cfg):
        raise NATSError(
            f"{weights} was trained with other dilations than the config has: give it the config "
            "that it was trained with, such as config.yaml beside it"
        )


def _dilations(cfg: CfgNode) -> Any:
    """Those of a network's convs; None of a search whose weights are for all dilations."""
    nats = cfg.MODEL.NATS
    if cfg.MODEL.BACKBONE.NAME != "build_nats_backbone":
        return {}
    if not nats.ARCHITECTURE:
        return None if nats.get("SAMPLE") or nats.SHARE_WEIGHTS else "a mixture"
    return _changed(nats.ARCHITECTURE)


def _changed(architecture: Sequence[Any]) -> Mapping[str, Any]:
    """The layers that are not plain."""
    layers = Architecture.from_config(architecture).layers
    return {k: v for k, v in layers.items() if any(tuple(d) != (1, 1) for _, *d in v)}
