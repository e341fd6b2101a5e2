"""Write an architecture that needs no search, and its plain config."""

import argparse
import os
import shlex
from typing import Any, List, Sequence, Tuple

import torch
from torch import nn

from ..errors import NATSError
from ..look.networks import build_network
from ..method.architecture import Architecture
from ..method.names import searchable
from ..method.search_space import Dilation, SearchSpace
from .cli import write


def main(args: argparse.Namespace) -> None:
    if args.dilations and not args.random:
        raise NATSError("--dilations is for --random: give both, or neither")
    if args.opts and args.network:
        raise NATSError(f"{args.opts[0]}: KEY VALUE pairs need --config-file")
    if args.network:
        base, network, space = None, build_network(args.network, "meta"), SearchSpace()
    else:
        base, network, space = _detector(args.config_file, args.opts)
    convs = _trained(args.convs or space.convs, network)
    if args.random:
        drawn_from = _drawn_from(space, convs, args.dilations)
        architecture = Architecture.random(network, drawn_from, args.seed)
    else:
        architecture = Architecture.uniform(network, args.uniform, convs)

    path = os.path.join(args.output, "architecture.yaml")
    write(path, lambda: architecture.save(path))
    if base is None:
        following = f'detectron2_nats.apply_architecture(network, "{path}")'
    else:
        following = (
            f"nats-train --config-file {shlex.quote(_write_config(base, architecture, args))}"
        )
    print(f"\n{architecture.summary()}\n\nnext: {following}")


def _detector(path: str, opts: Sequence[str]) -> Tuple[Any, nn.Module, SearchSpace]:
    """A config's detector: plain config, backbone without weights; and what it searches."""
    from detectron2.modeling import build_backbone

    from ..backbone import search_space_from_config
    from ..config import load_config
    from ..search.export import retrain_config, searched_detector

    cfg = load_config(path, opts)
    is_search = cfg.MODEL.BACKBONE.NAME == "build_nats_backbone" and not cfg.MODEL.NATS.ARCHITECTURE
    base = searched_detector(retrain_config(cfg, opts) if is_search else cfg)
    base.MODEL.NATS.ARCHITECTURE = []
    plain = base.clone()
    if plain.MODEL.BACKBONE.NAME == "build_nats_backbone":
        plain.MODEL.BACKBONE.NAME = plain.MODEL.NATS.BASE_BACKBONE
    with torch.device("meta"):
        backbone = build_backbone(plain)
    return base, backbone, search_space_from_config(cfg)


def _trained(convs: Sequence[str], network: nn.Module) -> List[str]:
    """The patterns whose convs the network builds and trains; says which are left out."""
    trained = []
    for pattern in convs:
        try:
            matching = searchable(network, [pattern]).values()
        except NATSError as error:
            print(f"left out: {error}")
            continue
        if any(conv.weight.requires_grad for conv in matching):
            trained.append(pattern)
        else:
            print(f"left out {pattern}: it is frozen (MODEL.BACKBONE.FREEZE_AT)")
    if not trained:
        raise NATSError("no conv is left to change: name some by --convs")
    return trained


def _drawn_from(
    space: SearchSpace, convs: Sequence[str], dilations: Sequence[Dilation]
) -> SearchSpace:
    """The search space of the patterns `convs` alone, or with the same `dilations` for all."""
    unknown = [pattern for pattern in convs if pattern not in space.genotypes]
    if unknown and not dilations:
        raise NATSError(
            f"MODEL.NATS.SPACE has dilations of {', '.join(space.genotypes)}, none of "
            f"{unknown[0]}: name some by --dilations"
        )
    groups = {"num_groups": space.num_groups, "channels_per_group": space.channels_per_group}
    genotypes = [dilations or space.genotypes[pattern] for pattern in convs]
    return SearchSpace(genotypes, convs, **groups)


def _write_config(base: Any, architecture: Architecture, args: argparse.Namespace) -> str:
    """Write the plain config; returns its path."""
    from ..search.export import export_config, write_config

    cfg = export_config(base, architecture)
    cfg.OUTPUT_DIR = os.path.join(args.output, "retrain")
    path = os.path.join(args.output, "retrain.yaml")
    write(path, lambda: write_config(cfg, path))
    return path
