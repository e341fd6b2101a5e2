"""Pictures: an architecture, α's history, detections.

Each function draws a matplotlib figure and returns it. Nothing is shown on a screen.
"""

import os
from typing import Any, Dict, Mapping, Sequence, Tuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ..method.architecture import Architecture
from ..method.search_space import PAPER_SETS, Dilation, stage_of

# Within a kind, darker means further, so that a grey print keeps the order. Hatches distinguish the
# kinds in grey: lines along the width for wide dilations, along the height for tall ones.
_KINDS = {"square": ("Blues", ""), "wide": ("Oranges", "---"), "tall": ("Greens", "|||")}


def _kind(dilation: Dilation) -> str:
    d_h, d_w = dilation
    return "square" if d_h == d_w else "wide" if d_w > d_h else "tall"


def dilation_styles(dilations: Sequence[Dilation]) -> Dict[Dilation, Dict[str, Any]]:
    """A face colour and a hatch for each dilation, in the order of a legend.

    The plain (1, 1) is light grey, square dilations are blue, wide ones orange, tall ones green.
    """
    # always includes the paper's, so that they have the same colours in all pictures
    known = sorted({*dilations, *PAPER_SETS["C"]["res5"]}, key=_legend_key)
    styles = {(1, 1): _style("Greys", 0.2, 0.2, "")}
    for kind, (colours, hatch) in _KINDS.items():
        members = [d for d in known if _kind(d) == kind and d != (1, 1)]
        for dilation, shade in zip(members, np.linspace(0.3, 0.95, len(members))):
            styles[dilation] = _style(colours, shade, 0.2 if shade > 0.6 else 1.0, hatch)
    return {dilation: styles[dilation] for dilation in sorted(set(dilations), key=_legend_key)}


def _legend_key(dilation: Dilation):
    return list(_KINDS).index(_kind(dilation)), sum(dilation), dilation


def _style(colours: str, face: float, lines: float, hatch: str) -> Dict[str, Any]:
    ramp = matplotlib.colormaps[colours]
    # with a width of 0 no edge is drawn, and its colour is used for the hatch
    return {"facecolor": ramp(face), "edgecolor": ramp(lines), "hatch": hatch, "linewidth": 0}


def _legend(owner, styles: Mapping[Dilation, Mapping[str, Any]], **place) -> None:
    """A legend of dilations, in the order in which their bars are stacked."""
    handles = [
        Patch(label=f"{d_h}×{d_w}" + (" (plain)" if d_h == d_w == 1 else ""), **style)
        for (d_h, d_w), style in styles.items()
    ]
    owner.legend(
        handles=handles[::-1],
        title="dilation\nheight × width",
        title_fontsize=9,
        frameon=False,
        fontsize=9,
        handleheight=1.6,
        handlelength=2.2,
        ncols=1 + len(handles) // 13,
        **place,
    )


def _figure(width: float, height: float, title: str) -> Figure:
    # Not pyplot, which keeps every figure and uses a screen if there is one
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def plot_architecture(architecture: Architecture, title: str = "") -> Figure:
    """A stacked bar per layer: the share of its output channels that has each dilation."""
    counts = {name: architecture.channels_per_dilation(name) for name in architecture.layers}
    styles = dilation_styles([d for layer in counts.values() for d in layer])
    figure = _figure(max(6.5, 2.6 + 0.36 * len(counts)), 4.2, title)
    axes = figure.subplots()
    stages = np.array([stage_of(name) for name in counts])
    channels = np.array([sum(layer.values()) for layer in counts.values()])
    gaps = np.cumsum(np.append(False, stages[1:] != stages[:-1]))  # between stages
    positions = np.arange(len(counts)) + 0.6 * gaps
    bottom = np.zeros(len(counts))
    for dilation, style in styles.items():
        shares = 100 * np.array([layer.get(dilation, 0) for layer in counts.values()]) / channels
        axes.bar(positions, shares, 0.86, bottom, **style)
        bottom += shares
    for stage in filter(None, np.unique(stages)):
        widths = "/".join(map(str, np.unique(channels[stages == stage])))
        label = f"{stage}\n{widths} channels"
        centre = positions[stages == stage].mean()
        axes.text(centre, 102, label, ha="center", va="bottom", fontsize=9)
    if not all(stages):
        labels, kind = list(counts), "conv"
    elif any(name.endswith("conv1") for name in counts):
        labels, kind = [name.split(".", 1)[1] for name in counts], "3×3 conv"
    else:
        labels, kind = [name.split(".")[1] for name in counts], "3×3 conv of block"
    axes.set_xticks(positions, labels, rotation=0 if kind.endswith("block") else 90, fontsize=8)
    axes.set_xlabel(kind)
    axes.set_ylabel("output channels, %")
    axes.set_ylim(0, 100)
    axes.set_xlim(-0.6, positions[-1] + 0.6)
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, styles, loc="outside right center")
    return figure


# -- α's history -------------------------------------------------------------------------------


def plot_history(history: Mapping[str, Any], title: str = "") -> Figure:
    """α over the iterations: how decided it is, votes changed, intensity of each dilation.

    Args:
        history: what :func:`.history.read_history` returns.
    """
    figure = _figure(7.5, 6.6, title)
    decided, votes, intensity = figure.subplots(3, sharex=True, height_ratios=[1.2, 1, 1.7])
    # Iterations count from 0: the line of iteration i is the state after i + 1 iterations
    x = np.asarray(history["iteration"]) + 1
    line = {"marker": "o" if len(x) < 40 else None, "markersize": 3, "clip_on": False}
    decided.plot(x, history["entropy"], label="entropy", color="#08519c", **line)
    decided.plot(x, history["leading"], label="groups that lead", color="#a63603", **line)
    decided.set_ylabel("share", fontsize=9)
    decided.set_ylim(0, 1)
    beside = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
    decided.legend(frameon=False, fontsize=9, **beside)
    votes.plot(x, history["votes_changed"], color="#08519c", **line)
    votes.set_ylabel("votes changed since\nthe last log line", fontsize=9)
    votes.set_ylim(bottom=0)
    styles = dilation_styles(list(history["intensity"]))
    shares = [100 * np.asarray(history["intensity"][d]) for d in styles]
    if len(x) == 1:  # an area needs two points
        x, shares = np.array([x[0] - 0.5, x[0] + 0.5]), [np.repeat(share, 2) for share in shares]
    bottom = np.zeros(len(x))
    for style, share in zip(styles.values(), shares):
        intensity.fill_between(x, bottom, bottom + share, **style)
        bottom += share
    intensity.set_ylabel("votes over all layers, %", fontsize=9)
    intensity.set_ylim(0, 100)
    intensity.set_xlim(x[0], x[-1])
    intensity.xaxis.get_major_locator().set_params(integer=True)
    intensity.set_xlabel("iteration")
    for axes in (decided, votes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _legend(intensity, styles, **beside)
    return figure


# -- detections --------------------------------------------------------------------------------


def plot_detections(
    images: Sequence[np.ndarray],
    detections: Mapping[str, Sequence[Sequence[Tuple[Sequence[float], int, float]]]],
    class_names: Sequence[str],
    title: str = "",
) -> Figure:
    """A grid of detections: images as rows, networks as columns, a colour per class.

    Args:
        images: each (H, W, 3) uint8, RGB.
        detections: name of the network → for each image a list of (box, class index, score), with
            boxes (x0, y0, x1, y1) in pixels.
        class_names: in the order of their indices.
    """
    palette = matplotlib.colormaps["tab10"].colors
    aspects = [image.shape[0] / image.shape[1] for image in images]
    figure = _figure(3.6 * len(detections), 0.5 + 3.55 * sum(aspects), title)
    grid = figure.subplots(len(images), len(detections), squeeze=False, height_ratios=aspects)
    for column, (network, per_image) in enumerate(detections.items()):
        for row, image in enumerate(images):
            axes, height = grid[row][column], image.shape[0]
            axes.imshow(image)
            axes.axis("off")
            if row == 0:
                axes.set_title(network, fontsize=10)
            if not per_image[row]:
                style = {"facecolor": "white", "edgecolor": "none", "pad": 2}
                axes.text(2, 2, "nothing detected", fontsize=8, va="top", bbox=style)
            for (x0, y0, x1, y1), label, score in per_image[row]:
                colour = palette[label % len(palette)]
                axes.add_patch(
                    Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, lw=1.5)
                )
                name = class_names[label] if label < len(class_names) else str(label)
                # above the box, or inside it at the upper edge of the image
                y = y0 if y0 > 0.07 * height else y0 + 0.065 * height
                box = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
                style = {"fontsize": 7, "color": "white", "va": "bottom", "clip_on": True}
                axes.text(x0, y, f"{name} {score:.2f}", bbox=box, **style)
    return figure


# -- output ------------------------------------------------------------------------------------


def save(figure: Figure, folder: str, name: str) -> str:
    """Write FOLDER/NAME.png; returns its path."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{name}.png")
    figure.savefig(path, dpi=150)
    return path
