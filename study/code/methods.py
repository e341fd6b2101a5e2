"""The methods that a study compares, as they are written on the command line."""

import argparse
import re
from dataclasses import dataclass
from typing import Optional, Tuple

from ...method.search_space import Dilation

HELP = """
methods:
  plain        the detector without a search
  plain-long   the same, for as many iterations as search and retraining together
  random       each channel group draws its dilation, anew for each seed
  cycle        neighbouring channels take turns: 1x1, 2x2, 1x1, 4x4
  sawtooth     one dilation per conv, in turns over the depth: 1x1, 2x2, 3x3
  random-best-of-4
               4 draws, or another number, are each trained for that part of the search's
               iterations and tested on the calibration split; the best one is retrained, and
               the time of all counts
  path         path-level search: one choice per conv
  transposed   what nats-voted found, with height and width of each dilation swapped
  nats-paper   the search, with channels sorted by dilation
  nats-voted   the same search, each group keeping its own channels
  nats-warm    the same architecture, retrained from the super-network's own weights
  path-warm    what path found, likewise
  5x5          one dilation in all searched convs, this one or another
  NAME         the architecture of --architecture NAME=FILE, the same for each seed
  5x5-warm, NAME-warm: likewise, from the weights of the nats- methods' super-network
transposed and the nats- methods take a margin (SEARCH.DECODE_MARGIN) after an @, nats-warm@0.1, or
the most dilations of a conv (SEARCH.DECODE_AT_MOST), nats-warm@2.
All take a length: plain-1.5x, NAME-1.5x=FILE are retrained for 1.5 times as many iterations.
A search's iteration takes longer than one of training, so equal time needs more than plain-long.
"""

DEFAULTS = ("plain", "plain-long", "random", "nats-paper", "nats-voted", "nats-warm")

# Kind of method → the search that it needs.
_SEARCHES = {
    "plain": "",
    "random": "",
    "cycle": "",
    "sawtooth": "",
    "path": "path",
    "transposed": "nats",
    "nats-paper": "nats",
    "nats-voted": "nats",
    "nats-warm": "nats",
    "path-warm": "path",
}
_GRAMMAR = re.compile(r"(.*?)(?:@(0?\.\d+|\d))?(?:-(\d{1,3}(?:\.\d{1,3})?)x)?", re.DOTALL)
_BEST_OF = re.compile(r"random-best-of-([2-9]|[1-9]\d)")
_UNIFORM = re.compile(r"([1-9]\d?)x([1-9]\d?)(?:-warm)?")  # height and width of the dilation


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: as given; also that of its runs' folders.
        kind: without what follows an @, and without length.
        margin: with which it decodes, below 1; None if none is given.
        at_most: so many dilations in each conv; 0 if it is not given.
        length: iterations of its retraining, relative to the config's. None for plain-long, whose
            length depends on the search's.
    """

    name: str
    kind: str
    margin: Optional[float]
    at_most: int
    length: Optional[float]

    @classmethod
    def of(cls, name: str) -> "Method":
        kind, given, length = _GRAMMAR.fullmatch(name).groups()
        at_most = int(given) if given and given.isdigit() else 0
        margin = float(given) if given and not at_most else None
        if kind == "plain-long":
            return cls(name, "plain", margin, at_most, length and float(length))
        return cls(name, kind, margin, at_most, float(length or 1))

    @property
    def warm(self) -> bool:
        """Whether it starts from the weights of a super-network."""
        return self.kind.endswith("-warm")

    @property
    def search(self) -> str:
        """The search that it needs: nats, path, or none."""
        return _SEARCHES.get(self.kind, "nats" if self.warm else "")

    @property
    def dilation(self) -> Optional[Dilation]:
        """That of all convs, if it is the same in all."""
        match = _UNIFORM.fullmatch(self.kind)
        return (int(match[1]), int(match[2])) if match else None

    @property
    def draws(self) -> int:
        """Of how many random architectures it is the best; 0 if it is none of these."""
        match = _BEST_OF.fullmatch(self.kind)
        return int(match[1]) if match else 0

    @property
    def is_reference(self) -> bool:
        """Whether anyone can build it without a search."""
        return self.kind in ("plain", "random", "cycle", "sawtooth") or bool(
            self.dilation and not self.warm
        )

    @property
    def is_known(self) -> bool:
        """Whether its name is one of :data:`HELP`, and no architecture's."""
        if self.kind not in _SEARCHES and not self.dilation and not self.draws:
            return False
        decodes = self.margin is not None or self.at_most
        if decodes and _SEARCHES.get(self.kind) != "nats":
            return False
        if self.kind == "plain" and self.name.startswith("plain-long"):
            return self.length is None
        return self.length > 0


def method_argument(text: str) -> str:
    """A `type` for :mod:`argparse`: the name of a method that needs no file."""
    if not Method.of(text).is_known:
        known = ["plain", "plain-long", *list(_SEARCHES)[1:]]
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected one of {', '.join(known)}, random-best-of-4, 5x5, 5x5-warm; with "
            "a length, like plain-1.5x; transposed and nats- also with @MARGIN or @MOST. KEY VALUE "
            "pairs come after "
            "another option than --methods"
        )
    return text


def named_file_argument(text: str) -> Tuple[str, str]:
    """A `type` for :mod:`argparse`: NAME=FILE, an architecture that is a method."""
    name, _, path = text.partition("=")
    method = Method.of(name)
    taken = method.kind in _SEARCHES or method.dilation or method.draws
    taken = taken or method.margin is not None or method.at_most
    if not name or not path or taken or "/" in name:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=FILE, NAME not being a method")
    return name, path


def seeds_argument(text: str) -> range:
    """A `type` for :mod:`argparse`: a number of seeds, or the first and the last."""
    match = re.fullmatch(r"(?:(\d{1,3})-)?(\d{1,3})", text)
    seeds = range(int(match[1] or 0), int(match[2]) + bool(match[1])) if match else range(0)
    if seeds:
        return seeds
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number of seeds, or a range like 2-3")
