"""Write an architecture that needs no search, and its plain config."""

import argparse
import os
import re
import shlex
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import nn

from ..errors import NATSError
from ..look.networks import build_network
from ..method.architecture import Architecture
from ..method.search_space import PAPER_SETS, STAGES, Dilation, SearchSpace, check_dilation
from ..method.stages import conv3x3_layers
from .cli import write


def main(args: argparse.Namespace) -> None:
    if (args.plain or args.dilations) and not args.random:
        option = "--plain" if args.plain else "--dilations"
        raise NATSError(f"{option} is for --random: give both, or neither")
    if args.opts and args.network:
        raise NATSError(f"{args.opts[0]}: KEY VALUE pairs need --config-file")
    if args.network:
        base, network = None, build_network(args.network, "meta")
        space, known = SearchSpace("C", stages=args.stages or STAGES), "C"
    else:
        base, network, space, known = _detector(args.config_file, args.opts)
    convs = args.convs or space.convs
    stages = () if convs else _kept(args.stages, space.stages, network)
    if args.random:
        chosen = _drawn_from(space, known, stages, convs, args.dilations)
        architecture = Architecture.random(network, chosen, args.seed, args.plain)
    elif args.uniform:
        architecture = Architecture.uniform(network, args.uniform, stages, convs)
    else:
        make = Architecture.cycle if args.cycle else Architecture.sawtooth
        architecture = make(network, args.cycle or args.sawtooth, stages, convs)

    path = os.path.join(args.output, "architecture.yaml")
    write(path, lambda: architecture.save(path))
    if base is None:
        following = f'detectron2_nats.apply_architecture(network, "{path}")'
    else:
        following = (
            f"nats-train --config-file {shlex.quote(_write_config(base, architecture, args))}"
        )
    print(f"\n{architecture.summary()}\n\nnext: {following}")


def _detector(path: str, opts: Sequence[str]) -> Tuple[Any, nn.Module, SearchSpace, Any]:
    """A config's detector: plain config, backbone without weights; and what it searches."""
    from detectron2.modeling import build_backbone

    from ..backbone import search_space_from_config
    from ..config import load_config
    from ..config.keys import genotype_set
    from ..search.export import retrain_config, searched_detector

    cfg = load_config(path, opts)
    is_search = cfg.MODEL.BACKBONE.NAME == "build_nats_backbone" and not cfg.MODEL.NATS.ARCHITECTURE
    base = searched_detector(retrain_config(cfg, opts) if is_search else cfg)
    if is_search and not cfg.SEARCH.RETRAIN_CONFIG:
        iterations = cfg.SOLVER.MAX_ITER
        print(f"SEARCH.RETRAIN_CONFIG is empty: the schedule is the search's ({iterations})")
    base.MODEL.NATS.ARCHITECTURE = []
    plain = base.clone()
    if plain.MODEL.BACKBONE.NAME == "build_nats_backbone":
        plain.MODEL.BACKBONE.NAME = plain.MODEL.NATS.BASE_BACKBONE
    with torch.device("meta"):
        backbone = build_backbone(plain)
    return base, backbone, search_space_from_config(cfg), genotype_set(cfg)


def _kept(
    named: Optional[Sequence[str]], usual: Sequence[str], network: nn.Module
) -> Sequence[str]:
    """The stages to change, which the network builds and trains; says which are left out.

    Args:
        named: by --stages; None if it is not given.
        usual: without it. If the network has none of them, it is all that it trains.
    """
    layers = conv3x3_layers(network)
    is_trained = {name.split(".")[0]: conv.weight.requires_grad for name, conv in layers.items()}
    trained = [stage for stage, able in is_trained.items() if able]
    kept = [stage for stage in named or usual if stage in trained]
    if not kept and not named:
        return trained
    for stage in named or usual:
        if stage not in is_trained:
            print(f"left out {stage}: the network does not build it, or it has no plain 3x3 conv")
        elif stage not in trained:
            print(f"left out {stage}: it is frozen (MODEL.BACKBONE.FREEZE_AT)")
    if not kept:
        raise NATSError(
            f"no stage is left to change: name some of {', '.join(trained)} by --stages"
        )
    return kept


def _drawn_from(
    space: SearchSpace,
    known: Any,
    stages: Sequence[str],
    convs: Sequence[str],
    dilations: Sequence[Dilation],
) -> SearchSpace:
    """The search space of `stages` or `convs` alone.

    Args:
        known: the name of the set of `space`, or its list.
        dilations: in all of them, instead of those of `space`.
    """
    if dilations:
        genotypes = [dilations] * len(convs or stages)
    elif convs:
        genotypes = known if isinstance(known, str) else list(space.genotypes.values())
    else:
        of_stage = PAPER_SETS[known] if isinstance(known, str) else space.genotypes
        unknown = [stage for stage in stages if stage not in of_stage]
        if unknown:
            raise NATSError(
                f"MODEL.NATS.SPACE lists dilations of {', '.join(of_stage)}, none of {unknown[0]}: "
                "name some by --dilations, or choose other --stages"
            )
        genotypes = [of_stage[stage] for stage in stages]
    where = {"convs": convs} if convs else {"stages": stages}
    return SearchSpace(
        genotypes,
        **where,
        num_groups=space.num_groups,
        channels_per_group=space.channels_per_group,
    )


def _write_config(base: Any, architecture: Architecture, args: argparse.Namespace) -> str:
    """Write the plain config; returns its path."""
    from ..search.export import export_config, write_config

    cfg = export_config(base, architecture)
    cfg.OUTPUT_DIR = os.path.join(args.output, "retrain")
    path = os.path.join(args.output, "retrain.yaml")
    write(path, lambda: write_config(cfg, path))
    return path
