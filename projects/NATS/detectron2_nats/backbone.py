"""The registered builder: any base backbone, then the super-network or the frozen choice."""

from typing import Any, Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from .config.keys import DEFAULT_NUM_GROUPS, genotype_set
from .errors import NATSError
from .method.architecture import Architecture
from .method.search_space import SearchSpace
from .method.transform import apply_architecture, to_supernet


def search_space_from_config(cfg: CfgNode) -> SearchSpace:
    """The search space that ``MODEL.NATS`` describes."""
    nats = cfg.MODEL.NATS
    num_groups, channels_per_group = nats.NUM_GROUPS, nats.CHANNELS_PER_GROUP
    if channels_per_group > 0 and num_groups == DEFAULT_NUM_GROUPS:
        num_groups = 0  # only CHANNELS_PER_GROUP was set
    return SearchSpace(
        genotype_set(cfg),
        nats.CONVS,
        num_groups=num_groups if num_groups or not channels_per_group else None,
        channels_per_group=channels_per_group or None,
        share_weights=nats.SHARE_WEIGHTS,
        sample=nats.SAMPLE,
    )


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
    if "batch_scale" in loaded:  # a run's checkpoint
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


@BACKBONE_REGISTRY.register()
def build_nats_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build ``MODEL.NATS.BASE_BACKBONE``, then transform it in place.

    With ``MODEL.NATS.ARCHITECTURE`` the result is the frozen network; without, the super-network.
    """
    name = cfg.MODEL.NATS.BASE_BACKBONE
    if name not in BACKBONE_REGISTRY or name == "build_nats_backbone":
        known = sorted(k for k, _ in BACKBONE_REGISTRY if k != "build_nats_backbone")
        raise NATSError(
            f"MODEL.NATS.BASE_BACKBONE {name!r} is not usable: expected one of {', '.join(known)}"
        )
    backbone = BACKBONE_REGISTRY.get(name)(cfg, input_shape)
    if cfg.MODEL.NATS.ARCHITECTURE:
        return apply_architecture(backbone, Architecture.from_config(cfg.MODEL.NATS.ARCHITECTURE))
    return to_supernet(backbone, search_space_from_config(cfg))
