"""Make an architecture without a search: dilations at random, one everywhere, or in turns.

A wider field alone may be what a detector lacks: try this before a search, and compare a search
with it. The drawn network has the plain one's parameters, and takes the same weights.
"""

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
from .cli import run_tool, tool_parser, write

EPILOG = """
examples:
  each channel group draws its dilation, here among those that were measured; train the result:
    $ %(prog)s --config-file configs/quickstart/registers.yaml --random \
        --dilations 1x1,3x3,5x5,1x5,5x1 --output output/drawn
    $ nats-train --config-file output/drawn/retrain.yaml
  half of the groups stay as they are; another draw:
    $ %(prog)s --config-file configs/quickstart/bars.yaml --random --plain 0.5 --seed 1 \\
        --output output/drawn
  long objects: one dilation in every conv, height x width, here along the width:
    $ %(prog)s --config-file configs/quickstart/bars.yaml --uniform 1x5 --output output/wide
  neighbouring channels take turns (as in PSConv); convs take turns over the depth (as in HDC):
    $ %(prog)s --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml \\
        --cycle 1x1,2x2,1x1,4x4 --output output/cycle
    $ %(prog)s --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml \\
        --sawtooth 1x1,2x2,3x3 --stages res4 res5 --output output/sawtooth
  for a network of torchvision or timm; Detectron2 is not needed:
    $ %(prog)s --network torchvision:resnet50 --uniform 2x2 --output output/resnet50
  any convs of any network, by patterns of their paths in it:
    $ %(prog)s --network torchvision:mobilenet_v3_large --convs 'features.1?.*' \\
        --uniform 1x3 --output output/mobilenet

Writes architecture.yaml, and with --config-file retrain.yaml, a plain config of full length.
The config may be a detector's or its search's; of a search, SEARCH.RETRAIN_CONFIG is written.
KEY VALUE pairs change it. Stages that the detector does not build, or does not train, are left out.
"""


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


# -- arguments ------------------------------------------------------------------------------------


def _dilation(text: str) -> Dilation:
    match = re.fullmatch(r"(\d{1,3})x(\d{1,3})", text)
    try:
        return check_dilation([int(match[1]), int(match[2])])
    except (NATSError, TypeError):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected height x width, each 1 to 64, like 1x5"
        ) from None


def _dilations(text: str) -> List[Dilation]:
    return [_dilation(part) for part in text.split(",")]


def _seed(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 0")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share, 0 to 1")
    return share


def run(prog: Optional[str] = None) -> None:
    """The command; `prog` is its name in the help."""
    parser = tool_parser(__doc__, EPILOG, prog)
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--config-file", default="", help="a detector's config: a path or a zoo name")
    of.add_argument(
        "--network", default="", metavar="LIBRARY:NAME", help="of torchvision or timm, instead"
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--random", action="store_true", help="each channel group draws its dilation")
    how.add_argument("--uniform", type=_dilation, metavar="HxW", help="one dilation in every conv")
    how.add_argument(
        "--cycle", type=_dilations, metavar="HxW,HxW,…", help="neighbouring channels take turns"
    )
    how.add_argument(
        "--sawtooth", type=_dilations, metavar="HxW,HxW,…", help="one per conv, in turns over depth"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of --random (%(default)s)")
    parser.add_argument(
        "--dilations",
        type=_dilations,
        default=[],
        metavar="HxW,HxW,…",
        help="from which --random draws, 1x1 first (default: those of MODEL.NATS.SPACE)",
    )
    parser.add_argument(
        "--plain", type=_share, default=0.0, metavar="SHARE", help="of --random's groups stay 1x1"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--stages",
        nargs="+",
        choices=["res2", "res3", "res4", "res5"],
        help="to change (default: MODEL.NATS.STAGES; of a --network res3 res4 res5)",
    )
    where.add_argument(
        "--convs",
        nargs="+",
        metavar="PATTERN",
        help="instead, any convs: patterns of their paths in the network or the config's backbone",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="change the config; last"
    )
    run_tool(main, parser.parse_args())
