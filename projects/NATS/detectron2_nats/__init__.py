"""NATS (NeurIPS 2019): channel-level receptive-field search for Detectron2 backbones.

Importing the package registers the backbone ``build_nats_backbone`` and the embedded data set.
"""

from . import versions  # noqa: F401  (first: says what is too old)

# isort: split
from . import backbone  # noqa: F401  (registration)
from .alpha import alpha_parameters, alpha_training
from .architecture import Architecture
from .config import add_nats_config
from .data.embedded import register_embedded_datasets
from .errors import NATSError
from .fuse import fuse_for_inference
from .layers import GroupedDilationConv2d, MixedDilationConv2d
from .search_space import SearchSpace
from .trainer import SearchTrainer
from .transform import apply_architecture, frozen_state_dict, to_supernet

__all__ = [
    "Architecture",
    "GroupedDilationConv2d",
    "MixedDilationConv2d",
    "NATSError",
    "SearchSpace",
    "SearchTrainer",
    "add_nats_config",
    "alpha_parameters",
    "alpha_training",
    "apply_architecture",
    "frozen_state_dict",
    "fuse_for_inference",
    "to_supernet",
]

register_embedded_datasets()
