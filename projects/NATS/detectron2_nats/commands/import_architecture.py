"""Turn IC-Conv's pattern or RF-Next's structure (JSON) into an architecture file."""

import argparse
import os

from ..bench.importers import from_ic_conv, from_rf_next, read_json
from ..errors import NATSError
from .cli import run_tool, tool_parser, whole_number, write

EPILOG = """
examples:
  IC-Conv's pattern for a ResNet-50:
    $ %(prog)s ic_resnet50_k9.json --output ic_conv.yaml
  without res2, whose weights FREEZE_AT 2 does not train:
    $ %(prog)s ic_resnet50_k9.json --output ic_conv.yaml \\
        --stages res3 res4 res5
  for a network of half the width; each dilation keeps its share of the channels:
    $ %(prog)s ic_resnet50_k9.json --output ic_conv.yaml --width 32
  the result of RF-Next on mmdet's ResNet:
    $ %(prog)s local_search_config_step11.json --output rf_next.yaml

nats-export turns the architecture file into a detector's config.
"""


def main(args: argparse.Namespace) -> None:
    content, name = read_json(args.source), os.path.basename(args.source)
    left_out = []
    try:
        if isinstance(content, list):  # IC-Conv's file is a list, RF-Next's a mapping
            architecture = from_ic_conv(content, name, args.width)
        else:
            architecture, left_out = from_rf_next(content, name, args.width)
    except NATSError as error:
        raise NATSError(f"{args.source}: {error}") from None
    if args.stages:
        missing = sorted(set(args.stages) - set(architecture.stages))
        if missing:
            raise NATSError(
                f"{args.source}: has no {', '.join(missing)}, only "
                f"{', '.join(architecture.stages)}"
            )
        architecture = architecture.restrict(args.stages)
    if left_out:
        print(f"left out, because they are outside the residual stages: {', '.join(left_out)}")
    write(args.output, lambda: architecture.save(args.output))


def run() -> None:
    parser = tool_parser(__doc__, EPILOG, "nats-import")
    parser.add_argument("source", help="IC-Conv's or RF-Next's JSON file")
    parser.add_argument("--output", required=True, help="architecture file to write")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=["res2", "res3", "res4", "res5"],
        help="stages to keep (default: all in the file)",
    )
    parser.add_argument(
        "--width",
        type=whole_number(4096),
        default=64,
        help="channels of res2's 3x3 convs (%(default)s; ResNeXt-101-32x4d: 128); each further "
        "stage has twice as many. RF-Next's files contain no widths; IC-Conv's are scaled",
    )
    run_tool(main, parser.parse_args())
