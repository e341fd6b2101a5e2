"""A picture of what :mod:`.look` finds: fields and objects, to scale over one image."""

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .rule import Look


def plot_look(found: Look, image: np.ndarray, boxes: np.ndarray) -> Figure:
    """Fields as rectangles around the image's centre, the objects where they are, all to scale.

    Args:
        image: (H, W, 3) uint8, RGB, on the network's input.
        boxes: (n, 4), its objects, x0 y0 x1 y1 in its pixels; may be empty.
    """
    height, width = image.shape[:2]
    across = max(width, *(e.width for e in found.levels.values()))
    along = max(height, *(e.height for e in found.levels.values()))
    scale = 6.0 / max(across, along)
    figure = Figure(figsize=(3.2 + scale * across, 1.0 + scale * along), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(image, extent=(0, width, height, 0))
    for x0, y0, x1, y1 in boxes:
        style = {"fill": False, "edgecolor": "#00b050", "linewidth": 1.0}
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **style))
    centre = width / 2, height / 2
    handles = [Rectangle((0, 0), 1, 1, fill=False, edgecolor="#00b050", label="objects")]
    colours = matplotlib.colormaps["plasma"](np.linspace(0.1, 0.85, len(found.levels)))
    for (name, extent), colour in zip(found.levels.items(), colours):
        label = f"{name} sees {extent}"
        axes.add_patch(_centred(centre, extent.height, extent.width, colour, "-", label))
        handles.append(axes.patches[-1])
    if found.objects is not None:
        h, w = np.median(found.objects.heights), np.median(found.objects.widths)
        label = f"median object {h:.0f} × {w:.0f}"
        axes.add_patch(_centred(centre, h, w, "#00b050", "--", label))
        handles.append(axes.patches[-1])
    axes.set_xlim(centre[0] - across / 2 - 2, centre[0] + across / 2 + 2)
    axes.set_ylim(centre[1] + along / 2 + 2, centre[1] - along / 2 - 2)
    axes.set_xlabel("px of the network's input", fontsize=9)
    axes.tick_params(labelsize=8)
    figure.legend(
        handles=handles,
        title="height × width, px",
        title_fontsize=9,
        loc="outside right upper",
        fontsize=9,
        frameon=False,
    )
    return figure


def _centred(centre, height: float, width: float, colour, line: str, label: str) -> Rectangle:
    corner = centre[0] - width / 2, centre[1] - height / 2
    style = {"fill": False, "edgecolor": colour, "linestyle": line, "linewidth": 2}
    return Rectangle(corner, width, height, label=label, **style)
