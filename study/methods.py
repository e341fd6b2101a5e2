"""The methods that a study compares: their names, and the commands that make their detectors."""

import argparse
import os
import re
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, List, Mapping, Sequence, Tuple

import numpy as np
from jobs import call

from detectron2_nats import Architecture
from detectron2_nats.config import load_config

HELP = """
methods:
  plain         the detector as it is
  random        each channel group draws its dilation among those that the search config names,
                anew for each seed
  half-random   the same draw, but half of the groups stay plain
  5x1           one dilation in all searched convs, height x width; this one or another
  cycle         neighbouring channels take turns: 1x1, 2x2, 1x1, 4x4
  nats-paper    a search, then a retraining; channels sorted by dilation
  nats-voted    the same search, each group keeping its own channels
  nats-warm     the same, retrained from the super-network's own weights
  transposed    nats-voted with height and width of each dilation swapped
  one-run       what the search config describes, search and training in one (SEARCH.FREEZE_AT)
  path-random, path-warm, path-one-run
                the same with one choice for each conv, instead of one for each channel group
  NAME          the architecture of --architecture NAME=FILE, the same for each seed
All take a length: plain-1.5x is trained for 1.5 times the iterations of its config. A search's
iteration takes longer than one of training: give each method the length that makes times equal.
"""

KINDS = {  # kind of method → the search that it needs
    "plain": "",
    "random": "",
    "path-random": "",
    "half-random": "",
    "cycle": "",
    "one-run": "",
    "path-one-run": "",
    "nats-paper": "nats",
    "nats-voted": "nats",
    "nats-warm": "nats",
    "transposed": "nats",
    "path-warm": "path",
}
PATH_LEVEL = ["MODEL.NATS.NUM_GROUPS", "1", "MODEL.NATS.CHANNELS_PER_GROUP", "0"]
CYCLE = ((1, 1), (2, 2), (1, 1), (4, 4))
"""PSConv's dilations (Li et al., ECCV 2020)."""

Layers = Mapping[str, Sequence[Sequence[int]]]
"""Layer name → segments (output channels, d_h, d_w)."""


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: as on the command line; also that of its runs' folders.
        kind: without its length.
        length: iterations of its training, relative to the config's.
        file: its architecture file; "" if it has none.
    """

    name: str
    kind: str
    length: float
    file: str = ""

    @classmethod
    def of(cls, name: str, file: str = "") -> "Method":
        kind, length = re.fullmatch(
            r"(.*?)(?:-(\d{1,3}(?:\.\d{1,3})?)x)?", name, re.DOTALL
        ).groups()
        return cls(name, kind, float(length or 1), file)

    @property
    def search(self) -> str:
        """The search that it needs: nats, path, or none."""
        return KINDS.get(self.kind, "")

    @property
    def is_one_run(self) -> bool:
        return self.kind.endswith("one-run")

    @property
    def dilation(self) -> str:
        """That of all convs, "5x1", if it is the same in all."""
        return self.kind if re.fullmatch(r"[1-9]\d?x[1-9]\d?", self.kind) else ""

    @property
    def is_known(self) -> bool:
        """Whether its name is one of :data:`HELP`, and no architecture's."""
        return (self.kind in KINDS or bool(self.dilation)) and self.length > 0


def method_argument(text: str) -> Method:
    """A `type` for :mod:`argparse`: the name of a method that needs no file."""
    method = Method.of(text)
    if not method.is_known:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected one of {', '.join(KINDS)}, 5x1, or these with a length, like "
            "plain-1.5x. KEY VALUE pairs come after another option than --methods"
        )
    return method


def file_argument(text: str) -> Method:
    """A `type` for :mod:`argparse`: NAME=FILE, an architecture that is a method."""
    name, _, path = text.partition("=")
    method = Method.of(name, path)
    if not path or method.is_known or not re.fullmatch(r"\w[\w.-]*", name) or not method.length:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=FILE, NAME not being a method")
    return method


def training(method: Method, solver: Any) -> List[str]:
    """KEY VALUE pairs: the schedule of a config, ``cfg.SOLVER``, stretched to a method's length."""
    steps = tuple(round(step * method.length) for step in solver.STEPS)
    iterations = str(round(solver.MAX_ITER * method.length))
    return ["SOLVER.MAX_ITER", iterations, "SOLVER.STEPS", repr(steps)]


def prepare(method: Method, seed: int, folder: str, configs: Tuple[str, str], search: str) -> str:
    """Make what a method's training starts from, by the commands that a user would take.

    Args:
        folder: of the training. Files that are there already are kept.
        configs: those of the detector and of its search, which names the former's as its
            ``SEARCH.RETRAIN_CONFIG``.
        search: output folder of the search that the method needs.

    Returns:
        The config to train.

    Raises:
        NATSError: a command failed, for example because an architecture does not fit.
    """
    detector, searched = configs
    if method.kind == "plain":
        return detector
    if method.is_one_run:
        return searched
    result = os.path.join(folder, "retrain.yaml")
    if os.path.isfile(result):  # the last file that each of these commands writes
        return result
    export = partial(call, folder, "nats-export", "--config-file", detector, "--output", result)
    draw = partial(call, folder, "nats-draw", "--config-file", searched, "--output")
    if method.file:
        export(method.file)
    elif method.kind == "transposed":
        export(_changed(search, folder, transposed))
    elif search:
        weights = ["--weights", os.path.join(folder, "frozen.pth")]
        order = "paper" if method.kind == "nats-paper" else "voted"
        export(search, "--order", order, *(weights if method.kind.endswith("-warm") else ()))
    elif method.dilation:
        draw(folder, "--uniform", method.dilation)
    elif method.kind == "cycle":
        draw(drawn := os.path.join(folder, "drawn"), "--uniform", "1x1")
        export(_changed(drawn, folder, cycle))
    elif method.kind == "half-random":
        draw(drawn := os.path.join(folder, "drawn"), "--random", "--seed", str(seed))
        num_groups = load_config(searched).MODEL.NATS.NUM_GROUPS
        half = partial(half_plain, num_groups=num_groups, seed=seed)
        export(_changed(drawn, folder, half))
    else:
        groups = PATH_LEVEL if method.kind == "path-random" else []
        draw(folder, "--random", "--seed", str(seed), *groups)
    return result


def _changed(source: str, folder: str, change: Callable[[Layers], Layers]) -> str:
    """Write the architecture in the folder `source`, changed, to `folder`; returns its path."""
    layers = Architecture.load(os.path.join(source, "architecture.yaml")).layers
    path = os.path.join(folder, "architecture.yaml")
    Architecture(change(layers)).save(path)
    return path


def transposed(layers: Layers) -> Layers:
    """The same with height and width of each dilation swapped."""
    return {name: [(c, w, h) for c, h, w in segments] for name, segments in layers.items()}


def cycle(layers: Layers) -> Layers:
    """Layers of the same channels, of which neighbouring ones take turns. Not for ResNeXt."""
    channels = {name: sum(segment[0] for segment in layers[name]) for name in layers}
    return {name: [(1, *CYCLE[i % 4]) for i in range(count)] for name, count in channels.items()}


def half_plain(layers: Layers, num_groups: int, seed: int) -> Layers:
    """Layers in which half of the channel groups, over all convs, are (1, 1) instead."""
    total = num_groups * len(layers)
    stay = np.random.default_rng([seed, 1]).permutation(total) < round(total / 2)
    result = {}
    for place, (name, segments) in enumerate(layers.items()):
        of_channel = [dilation for channels, *dilation in segments for _ in range(channels)]
        width = len(of_channel) // num_groups
        groups = zip(stay[num_groups * place :], of_channel[::width][:num_groups])
        result[name] = [(width, *((1, 1) if plain else dilation)) for plain, dilation in groups]
    return result
