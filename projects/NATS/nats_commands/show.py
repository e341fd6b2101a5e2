"""Show what runs came to: what was chosen and at which cost, how, whether it pays, what is found.

Of a search, its table of dilations and costs, architecture.png and history.png. Of trained
detectors, also their AP, and what they detect on the same images, side by side.
"""

import argparse

from .kinds import whole_number

EXAMPLES = """
examples:
  a search:
    $ nats-show output/search
  would its choice pay, on 200 calibration images (minutes, nothing is trained):
    $ nats-show output/search --score 200
  two trained detectors beside each other:
    $ nats-show output/plain output/search/retrain --images 4 --output output/pictures
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="+",
        metavar="RUN [RUN ...] [KEY VALUE ...]",
        help="the output folder of a search or of a training, or an architecture file; then "
        "changes of their configs",
    )
    parser.add_argument(
        "--config-file", default="", help="of an architecture file: a detector to count the cost of"
    )
    parser.add_argument(
        "--score",
        type=whole_number(1, 1_000_000),
        metavar="IMAGES",
        help="score a search's choice, and what needs no search, on so many calibration images",
    )
    parser.add_argument(
        "--images",
        type=whole_number(0, 4096),
        default=4,
        help="number of images with detections (%(default)s)",
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="lowest score that is drawn (%(default)s)"
    )
    parser.add_argument(
        "--output", default="", metavar="FOLDER", help="of the pictures (default: RUN/pictures)"
    )
