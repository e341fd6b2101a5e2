"""Make an architecture without a search: one dilation everywhere, or dilations at random.

A wider field alone may be what a detector lacks: try this before a search, and compare a search
with it. The drawn network has the plain one's parameters, and takes the same weights."""

import argparse

from .kinds import add_pairs, dilation_pair, dilation_pairs, whole_number

EXAMPLES = """
examples:
  long objects: one dilation in every conv, height x width, here along the height:
    $ nats-draw --config-file configs/quickstart/registers.yaml --uniform 5x1 --output output/drawn
    $ nats-train --config-file output/drawn/retrain.yaml
  each channel group draws its dilation:
    $ nats-draw --config-file configs/quickstart/registers.yaml --random \\
        --dilations 1x1,3x3,5x5,1x5,5x1 --output output/random

Writes architecture.yaml, and with --config-file retrain.yaml, a plain config of full length: of the
detector, or of a search's SEARCH.RETRAIN_CONFIG.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--config-file", default="", help="a detector's config: a path or a zoo name")
    of.add_argument(
        "--network", default="", metavar="LIBRARY:NAME", help="of torchvision or timm, instead"
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--uniform", type=dilation_pair, metavar="HxW", help="one dilation in every conv"
    )
    how.add_argument("--random", action="store_true", help="each channel group draws its dilation")
    parser.add_argument(
        "--seed", type=whole_number(0, 999_999_999), default=0, help="of --random (%(default)s)"
    )
    parser.add_argument(
        "--dilations",
        type=dilation_pairs,
        default=[],
        metavar="HxW,HxW,…",
        help="from which --random draws, 1x1 first (default: those of MODEL.NATS.SPACE)",
    )
    parser.add_argument(
        "--convs",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="which convs, by their names, such as 'res4.*' (default: MODEL.NATS.CONVS, or of a "
        "--network res3.* res4.* res5.*)",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write")
    add_pairs(parser)
