"""Write the plain config of a searched detector, and if asked for, its weights."""

import argparse

from .kinds import whole_number

EXAMPLES = """
examples:
  retrain.yaml once more, from the search's output folder:
    $ nats-export output/search
  with the super-network's own weights, to start from instead of ImageNet's (voted order):
    $ nats-export output/search --order voted --weights output/search/frozen.pth
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a search's output folder, or an architecture file")
    parser.add_argument(
        "--config-file",
        default="",
        help="detector to export: a path or a zoo name (default: SEARCH.RETRAIN_CONFIG, or the one "
        "that was searched)",
    )
    parser.add_argument(
        "--output", default="", help="config to write (default: retrain.yaml in SOURCE)"
    )
    parser.add_argument(
        "--order", choices=["paper", "voted"], help="decode the newest checkpoint in this order"
    )
    parser.add_argument(
        "--margin", type=float, help="decode the newest checkpoint with this SEARCH.DECODE_MARGIN"
    )
    parser.add_argument(
        "--at-most",
        type=whole_number(1, 64),
        metavar="K",
        help="decode it with this SEARCH.DECODE_AT_MOST: K dilations in each conv; 1 gives plain "
        "convs, which every exporter knows",
    )
    parser.add_argument(
        "--weights", default="", metavar="FILE", help="also write the super-network's weights"
    )
