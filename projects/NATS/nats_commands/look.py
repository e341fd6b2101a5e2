"""How far does a detector see, how large are its objects, and what should be tried first?

Prints both, a verdict by the rule of the measured cases, and the next command. Minutes at most, and
nothing is trained. Height and width are apart, because objects may be long in one direction."""

import argparse

from .kinds import whole_number

EXAMPLES = """
examples:
  a detector: config and weights, with the objects of its DATASETS.TEST:
    $ nats-look configs/quickstart/bars.yaml nats://embedded_r50.pth --output output/look
  a network of torchvision or timm; Detectron2 is not needed:
    $ nats-look --network torchvision:resnet50 --weights resnet50.pth \\
        --annotations val.json --images images --size 800

A level's field is the central rectangle that holds 90 percent of what its output depends on, with
these weights. Without WEIGHTS, the config's MODEL.WEIGHTS are taken.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG [WEIGHTS] [KEY VALUE ...]",
        help="of a detector: config (a path or a zoo name), weights, changes of the config",
    )
    parser.add_argument(
        "--annotations", metavar="JSON", help="the objects, in COCO's format (DATASETS.TEST)"
    )
    parser.add_argument("--images", metavar="FOLDER", help="of the annotations' images")
    parser.add_argument(
        "--network", default="", metavar="LIBRARY:NAME", help="of torchvision or timm, instead"
    )
    parser.add_argument(
        "--weights", dest="file", default="", metavar="FILE", help="of --network: a state dict"
    )
    parser.add_argument(
        "--size",
        type=whole_number(1, 4096),
        default=800,
        help="of --network: shorter side of its input, px (%(default)s); the longer one is at most "
        "1333 / 800 of it",
    )
    parser.add_argument(
        "--levels", nargs="+", default=[], metavar="PART", help="parts of the network to look at"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="also draw look.png there: fields and objects, to scale"
    )
