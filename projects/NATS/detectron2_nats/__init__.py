"""NATS (NeurIPS 2019): channel-level receptive-field search for detection backbones.

With Detectron2, importing the package registers the backbone ``build_nats_backbone`` and the
embedded data sets. Without, all but what is made for its configs and trainer is there.

``method`` is the paper's: search space, convs, decoding, for any training loop. ``search`` trains α
with Detectron2, ``engine`` is a training that survives kills, ``data`` and ``toy`` are its data.
``look`` measures what a network sees, ``show`` draws what came out; ``commands`` are the ways in.
"""

from importlib.util import find_spec

from . import versions  # noqa: F401  (first: says what is too old)

# isort: split
from .errors import NATSError
from .method.alpha import alpha_parameters, alpha_training
from .method.architecture import Architecture
from .method.fuse import fuse_for_inference
from .method.layers import GroupedDilationConv2d, MixedDilationConv2d
from .method.search_space import SearchSpace
from .method.transform import apply_architecture, frozen_state_dict, to_supernet

__all__ = [
    "Architecture",
    "GroupedDilationConv2d",
    "MixedDilationConv2d",
    "NATSError",
    "SearchSpace",
    "alpha_parameters",
    "alpha_training",
    "apply_architecture",
    "frozen_state_dict",
    "fuse_for_inference",
    "to_supernet",
]

if find_spec("detectron2"):
    from . import backbone  # noqa: F401  (registration)
    from .config import add_nats_config
    from .search.trainer import SearchTrainer
    from .toy.catalog import register_embedded_datasets

    __all__ += ["SearchTrainer", "add_nats_config"]
    register_embedded_datasets()


def __getattr__(name: str):
    if name in ("SearchTrainer", "add_nats_config"):
        raise ImportError(f"detectron2_nats.{name} needs Detectron2, which is not installed here")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
