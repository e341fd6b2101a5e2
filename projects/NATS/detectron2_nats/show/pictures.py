"""Pictures: an architecture, and α's history.

Each function draws a matplotlib figure and returns it. Nothing is shown on a screen.
"""

import os
from typing import Any, Dict, Iterable, Mapping

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..method.architecture import Architecture
from ..method.search_space import PAPER_SETS, Dilation, stage_of

_KINDS = ("Blues", "Oranges", "Greens")
"""Colours of square, wide and tall dilations; the plain (1, 1) is grey."""


def _kind(dilation: Dilation) -> int:
    d_h, d_w = dilation
    return 0 if d_h == d_w else 1 if d_w > d_h else 2


def dilation_colours(dilations: Iterable[Dilation]) -> Dict[Dilation, Any]:
    """A colour for each dilation, in the order of a legend. Within a kind, darker means further."""
    # always includes the paper's, so that they have the same colours in all pictures
    known = sorted({*dilations, *PAPER_SETS["C"]["res5"]}, key=lambda d: (_kind(d), sum(d), d))
    colours = {(1, 1): matplotlib.colormaps["Greys"](0.25)}
    for kind, ramp in enumerate(_KINDS):
        members = [d for d in known if _kind(d) == kind and d != (1, 1)]
        for dilation, shade in zip(members, np.linspace(0.35, 0.95, len(members))):
            colours[dilation] = matplotlib.colormaps[ramp](shade)
    return {dilation: colours[dilation] for dilation in known if dilation in set(dilations)}


def _legend(owner, colours: Mapping[Dilation, Any], **place) -> None:
    """A legend of dilations, in the order in which their bars are stacked."""
    handles = [Patch(label=f"{h}×{w}", color=colour) for (h, w), colour in colours.items()]
    columns = 1 + len(handles) // 16
    title = "dilation\nheight × width"
    owner.legend(handles=handles[::-1], title=title, frameon=False, ncols=columns, **place)


def _figure(width: float, height: float) -> Figure:
    # Not pyplot, which keeps every figure and uses a screen if there is one
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_architecture(architecture: Architecture) -> Figure:
    """A stacked bar per layer: the share of its output channels that has each dilation."""
    counts = {name: architecture.channels_per_dilation(name) for name in architecture.layers}
    colours = dilation_colours({d for layer in counts.values() for d in layer})
    figure = _figure(max(6.5, 2.6 + 0.36 * len(counts)), 4.2)
    axes = figure.subplots()
    stages = np.array([stage_of(name) for name in counts])
    channels = np.array([sum(layer.values()) for layer in counts.values()])
    gaps = np.cumsum(np.append(False, stages[1:] != stages[:-1]))  # between stages
    positions = np.arange(len(counts)) + 0.6 * gaps
    bottom = np.zeros(len(counts))
    for dilation, colour in colours.items():
        shares = 100 * np.array([layer.get(dilation, 0) for layer in counts.values()]) / channels
        axes.bar(positions, shares, 0.86, bottom, color=colour)
        bottom += shares
    for stage in filter(None, np.unique(stages)):
        widths = "/".join(map(str, np.unique(channels[stages == stage])))
        label = f"{stage}\n{widths} channels"
        centre = positions[stages == stage].mean()
        axes.text(centre, 102, label, ha="center", va="bottom", fontsize=9)
    axes.set_xticks(positions, list(counts), rotation=90, fontsize=8)
    axes.set_ylabel("output channels, %")
    axes.set_ylim(0, 100)
    axes.set_xlim(-0.6, positions[-1] + 0.6)
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, colours, loc="outside right center")
    return figure


def plot_history(history: Mapping[str, Any], title: str = "") -> Figure:
    """α over the iterations: how decided it is, both losses, and the votes for each dilation.

    Args:
        history: what :func:`.history.read_history` returns.
    """
    figure = _figure(7.5, 6.6)
    figure.suptitle(title, fontsize=11)
    decided, losses, votes = figure.subplots(3, sharex=True, height_ratios=[1, 1, 1.6])
    # Iterations count from 0: the line of iteration i is the state after i + 1 iterations
    x = np.asarray(history["iteration"]) + 1
    beside = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
    for axes, lines, label in (
        (decided, {"entropy of α": "entropy", "groups that lead": "leading"}, "share"),
        (losses, {"weights": "total_loss", "α": "alpha_loss"}, "loss"),
    ):
        for name, key in lines.items():
            axes.plot(x, history[key], label=name, marker="." if len(x) < 40 else None)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, **beside)
    decided.set_ylim(0, 1.02)
    colours = dilation_colours(history["intensity"])
    shares = [100 * np.asarray(history["intensity"][dilation]) for dilation in colours]
    votes.stackplot(x, shares, colors=colours.values())
    votes.set_ylabel("votes over all layers, %")
    votes.set_ylim(0, 100)
    votes.set_xlabel("iteration")
    _legend(votes, colours, **beside)
    return figure


def save(figure: Figure, folder: str, name: str) -> str:
    """Write FOLDER/NAME.png; returns its path."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{name}.png")
    figure.savefig(path, dpi=150)
    return path
