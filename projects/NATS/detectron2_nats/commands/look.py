"""Measure how far a detector sees and how large its objects are; say what to try first."""

import argparse
import os
import shlex
from typing import List, Sequence, Tuple

import torch

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
)
from ..look.receptive_field import SIDES
from ..look.rule import Look, look
from ..method.names import residual_stages
from .cli import write

_NOISE = 256
"""Side of the noise that is looked at where no images are given."""


def main(args: argparse.Namespace) -> None:
    args.config, args.weights, args.rest = _words(args)
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
        draw = list(found.verdict.draw)
        if draw and not residual_stages(network):
            draw += ["--convs", "*"]
        print(f"\nnext: {_next_step(args, draw)}")


def _words(args: argparse.Namespace) -> Tuple[str, str, List[str]]:
    """CONFIG [WEIGHTS] [KEY VALUE ...] → the three. Pairs are even, so the count tells."""
    words = args.words
    if args.network or not words:
        return "", args.file, words
    if args.file:
        raise NATSError("--weights is for --network; a detector's come after CONFIG")
    weights = words[1] if len(words) % 2 == 0 else ""
    return words[0], weights, words[2 if weights else 1 :]


def _network(args: argparse.Namespace):
    """The network, the size of its input, and how images are normalised."""
    if args.rest:
        raise NATSError(f"{args.rest[0]}: needs CONFIG, not --network")
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
    records = given or detector.records()
    return detector.backbone, detector.size, detector.normalisation, records


def _draw(folder: str, found: Look, records: Sequence[Record], size: InputSize) -> None:
    from ..look.picture import plot_look
    from ..show import pictures  # matplotlib is slow to import

    record = max(records, key=lambda record: len(record.boxes))  # shows most objects
    figure = plot_look(found, image_on_input(record, size), boxes_on_input([record], size))
    path = os.path.join(folder, "look.png")
    print()
    write(path, lambda: pictures.save(figure, folder, "look"))


def _next_step(args: argparse.Namespace, draw: Sequence[str]) -> str:
    """The command to run next. `draw`: options of nats-draw; none: train the network as it is."""
    if args.network:
        words = ["nats-draw", "--network", args.network, *draw, "--output", "output/drawn"]
        return shlex.join(words) if draw else "train the network as it is"
    config = ["--config-file", args.config]
    if draw:
        return shlex.join(["nats-draw", *config, *draw, "--output", "output/drawn", *args.rest])
    return f"train the plain detector, {shlex.join(['nats-train', *config, *args.rest])}"
