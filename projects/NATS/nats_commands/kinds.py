"""Kinds of argument that several commands take."""

import argparse
from typing import Callable, List, Tuple


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """A `type` for :mod:`argparse`: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > 9 or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected a whole number from {least} to {most}"
            )
        return int(text)

    return parse


def dilation_pair(text: str) -> Tuple[int, int]:
    """ "1x5" → (1, 5)."""
    sides = text.split("x")
    if len(sides) != 2 or not all(s.isdecimal() and 1 <= int(s[:9]) <= 64 for s in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected height x width, each 1 to 64, like 1x5"
        )
    return int(sides[0]), int(sides[1])


def dilation_pairs(text: str) -> List[Tuple[int, int]]:
    """ "1x1,1x5" → [(1, 1), (1, 5)]."""
    return [dilation_pair(part) for part in text.split(",")]


def add_pairs(parser: argparse.ArgumentParser) -> None:
    """What changes the config, behind all options."""
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="change the config; last"
    )
