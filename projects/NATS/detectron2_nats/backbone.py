"""The registered builder: any base backbone, then the super-network or the frozen choice."""

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
