"""How far does a detector see, how large are its objects, and what should be tried first?

Prints both, a verdict by the rule of the measured cases, and the next command. Minutes at most, and
nothing is trained. Height and width are apart, because objects may be long in one direction.
"""

import argparse
import os
import shlex
from typing import List, Optional, Sequence, Tuple

import torch
from torch import nn

from ..errors import NATSError
from ..look.networks import build_network, load_weights
from ..look.objects import (
    InputSize,
    Record,
    boxes_on_input,
    evenly,
    image_on_input,
    normalised,
    read_coco,
    typical,
)
from ..look.receptive_field import SIDES
from ..look.rule import Look, look
from ..method.stages import residual_stages
from .cli import run_tool, tool_parser, whole_number, write

EPILOG = """
examples:
  a detector: config and weights, with the objects of its DATASETS.TEST:
    $ %(prog)s configs/quickstart/bars.yaml nats://embedded_r50.pth --output output/look
  your own data, on images as large as the network will get them:
    $ %(prog)s configs/examples/own_data_retrain.yaml path/to/R-50-half.pkl \\
        --annotations val.json --images images --output output/look INPUT.MIN_SIZE_TEST 240
  a network of torchvision or timm; Detectron2 is not needed:
    $ %(prog)s --network torchvision:resnet50 --weights resnet50.pth \\
        --annotations val.json --images images --size 800
  how far parts of it see, on noise:
    $ %(prog)s --network torchvision:resnet50 --levels layer2 layer3.5

A level's field is the central rectangle that holds 90 percent of what its output depends on. It is
that of the given weights: networks with weights drawn at random may see more or less. Without
WEIGHTS, the config's MODEL.WEIGHTS are taken. KEY VALUE pairs change the config. The verdict is on
the level that sees furthest. With --output, look.png shows fields and objects to scale.
"""

_NOISE = 256
"""Side of the noise that is looked at where no images are given."""


def main(args: argparse.Namespace) -> None:
    if bool(args.annotations) != bool(args.images):
        raise NATSError("--annotations and --images go together: give both")
    if bool(args.network) == bool(args.config):
        raise NATSError("give CONFIG and WEIGHTS of a detector, or --network")
    given = read_coco(args.annotations, args.images) if args.annotations else []
    if args.network:
        network, size, how = _network(args)
        records = given
    else:
        network, size, how, records = _detector(args, given)
    if args.output and not records:
        raise NATSError("--output: a picture needs images: give --annotations and --images")
    with_objects = any(len(record.boxes) for record in records)
    shown = evenly(records, SIDES[0][1])
    images = [normalised(image_on_input(record, size), *how) for record in shown]
    if not images:
        generator = torch.Generator().manual_seed(0)
        images = [torch.randn(3, _NOISE, _NOISE, generator=generator) for _ in range(SIDES[0][1])]
    boxes = boxes_on_input(records, size) if with_objects else None
    found = look(network, images, boxes, args.levels)
    print(found.report())
    if not with_objects:
        print("\nNo objects are given: --annotations and --images, and there is a verdict.")
    if args.output:
        _draw(args.output, found, records, size)
    if found.verdict:
        draw = [*found.verdict.draw, *_where(network)] if found.verdict.draw else []
        print(f"\nnext: {next_step(args, draw)}")


def _network(args: argparse.Namespace):
    """The network, the size of its input, and how images are normalised."""
    if args.rest or args.dataset:
        raise NATSError(f"{(args.rest or ['--dataset'])[0]}: needs CONFIG, not --network")
    network = build_network(args.network)
    if args.weights:
        share = load_weights(network, args.weights)
        if share < 1:
            print(f"{args.weights} holds {share:.0%} of the network's tensors")
    else:
        print("The weights are drawn at random: --weights FILE gives trained ones.\n")
    # a detector's own transform would resize the images
    network = getattr(network, "backbone", network)
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
    how = [255 * value for value in mean], [255 * value for value in deviation], "RGB"
    return network, InputSize(args.size, round(args.size * 1333 / 800)), how


def _detector(args: argparse.Namespace, given: Sequence[Record]):
    """Likewise; and the images and objects."""
    from ..look.detector import Detector  # needs Detectron2

    detector = Detector(args.config, args.weights, args.rest)
    if detector.untrained:
        names = ", ".join(dict.fromkeys(n.split(".")[1] for n in detector.untrained))
        print(f"The weights hold nothing for the backbone's {names}: drawn at random.\n")
    records = given or detector.records(args.dataset)
    return detector.backbone, detector.size, detector.normalisation, records


def _draw(folder: str, found: Look, records: Sequence[Record], size: InputSize) -> None:
    from ..look.picture import plot_look
    from ..show import pictures  # matplotlib is slow to import

    record = typical(records, size) if found.objects else records[0]
    figure = plot_look(found, image_on_input(record, size), boxes_on_input([record], size))
    path = os.path.join(folder, "look.png")
    print()
    write(path, lambda: pictures.save(figure, folder, "look", ["png"]))


def _where(network: nn.Module) -> List[str]:
    """The option that nats-draw needs for a network without residual stages."""
    try:
        residual_stages(network)
        return []
    except NATSError:
        return ["--convs", "*"]


def next_step(args: argparse.Namespace, draw: Sequence[str]) -> str:
    """The command to run next.

    Args:
        draw: options of nats-draw; none where the network is to be trained as it is.
    """
    if args.network:
        words = ["nats-draw", "--network", args.network, *draw, "--output", "output/drawn"]
        return shlex.join(words) if draw else "train the network as it is"
    config = ["--config-file", args.config]
    if draw:
        return shlex.join(["nats-draw", *config, *draw, "--output", "output/drawn", *args.rest])
    return f"train the plain detector, {shlex.join(['nats-train', *config, *args.rest])}"


def _split(words: List[str]) -> Tuple[str, str, List[str]]:
    """CONFIG [WEIGHTS] [KEY VALUE ...] → the three. Pairs are even, so the count tells."""
    if not words:
        return "", "", []
    weights = words[1] if len(words) % 2 == 0 else ""
    return words[0], weights, words[2 if weights else 1 :]


def run(prog: Optional[str] = None) -> None:
    """The command; `prog` is its name in the help."""
    parser = tool_parser(__doc__, EPILOG, prog)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG [WEIGHTS] [KEY VALUE ...]",
        help="of a detector: config (a path or a zoo name), weights, changes of the config",
    )
    parser.add_argument("--dataset", default="", help="a registered one (DATASETS.TEST)")
    parser.add_argument("--annotations", metavar="JSON", help="the objects, in COCO's format")
    parser.add_argument("--images", metavar="FOLDER", help="of the annotations' images")
    parser.add_argument(
        "--network", default="", metavar="LIBRARY:NAME", help="of torchvision or timm, instead"
    )
    parser.add_argument(
        "--weights", dest="file", default="", metavar="FILE", help="of --network: a state dict"
    )
    parser.add_argument(
        "--size",
        type=whole_number(4096),
        default=800,
        help="of --network: shorter side of its input, px (%(default)s); the longer one is at most "
        "1333 / 800 of it",
    )
    parser.add_argument(
        "--levels", nargs="+", default=[], metavar="PART", help="parts of the network to look at"
    )
    parser.add_argument("--output", metavar="FOLDER", help="also draw look.png there")
    args = parser.parse_intermixed_args()
    args.config, args.weights, args.rest = ("", args.file, args.words)
    if not args.network:
        if args.file:
            parser.error("--weights is for --network; a detector's come after CONFIG")
        args.config, args.weights, args.rest = _split(args.words)
    run_tool(main, args)
