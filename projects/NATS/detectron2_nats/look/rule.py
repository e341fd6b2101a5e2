"""Does a detector see as far as its objects are large? What to do is read off both, by a rule.

The rule is that of the measured cases: bars, blood cells, car parts, lines of text on receipts, and
columns of registers. It needs no training, and no Detectron2.
"""

from dataclasses import dataclass, field
from typing import Dict, List, Mapping, Optional, Sequence

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

from ..errors import NATSError
from .receptive_field import Extent, field_extents

# An object's size is compared with the field in the direction in which it exceeds it most. For a
# square field this is its longer side.
SEEN_WHOLE = 1.0
"""Up to this median, random dilations lost AP: 3 on short bars (0.7 times the field), 5 on blood
cells with a whole detector (less than 0.3)."""

PAYS = 2.0
"""Above this median they gained, 4 to 41 AP: bars of both directions (2.4 times the field), car
parts at 160 px (2.3) and 320 px (4.7), columns of registers (5.6). Between, on blood cells cut
after res3 (1.7) and res2 (1.8), they gained nothing beyond chance; 11 on lines of text (1.2)."""

# The next three by the measured data sets (boxes of all splits):
#                              longer / shorter side        long   of these, in the
#                              10 %   half   90 %                  same direction
#   a direction pays:
#     bars                     4.1    5.5    7.3            100 %  100 %
#     columns of registers     3      12     27              88 %  100 %
#     lines of text, receipts  1.4    3.2    10              53 %  100 %
#   it does not:
#     car parts                1.2    1.7    3.6             20 %   98 %
#     blood cells              1.0    1.1    1.4              0 %
# So the share's bound may lie anywhere from 20 to 53 %. Nothing of both directions was measured.
LONG = 3.0
"""An object this many times as long as wide is long."""

MOSTLY_LONG = 0.5
"""Share of the objects that are long where a direction is recommended."""

SAME_DIRECTION = 0.8
"""Share of the long ones that lie in one direction; chosen, not measured."""

REACH = 5
"""The dilation that is recommended along the long side: (1, 5) gained 13 AP on receipts, (5, 1) 42
on registers; across it they lost 12 and gained 2 (docs/results/registers.md). No other reach was
tried there."""


DRAWN = "1x1,3x3,5x5,1x5,5x1"
"""From which random dilations were drawn on car parts and columns of registers. From the paper's
set C, up to (3, 3) in res3, they gained no more on car parts than longer training did
(docs/results/tried.md)."""


@dataclass(frozen=True)
class Objects:
    """Sizes of objects on the network's input.

    Args:
        boxes: (N, 4), x0 y0 x1 y1.
    """

    boxes: np.ndarray

    @property
    def heights(self) -> np.ndarray:
        return self.boxes[:, 3] - self.boxes[:, 1]

    @property
    def widths(self) -> np.ndarray:
        return self.boxes[:, 2] - self.boxes[:, 0]

    @property
    def longer(self) -> np.ndarray:
        """Of both sides."""
        return np.maximum(self.heights, self.widths)

    @property
    def aspects(self) -> np.ndarray:
        """How many times as long as wide: the longer side over the shorter."""
        return self.longer / np.minimum(self.heights, self.widths)

    @property
    def wider(self) -> float:
        """Share of those wider than tall."""
        return float((self.widths > self.heights).mean())

    @property
    def taller(self) -> float:
        """Share of those taller than wide."""
        return float((self.heights > self.widths).mean())

    def times(self, extent: Extent) -> np.ndarray:
        """(N,): each object's size over the field's, where it exceeds it most."""
        return np.maximum(self.heights / extent.height, self.widths / extent.width)


@dataclass(frozen=True)
class Verdict:
    """What the rule says.

    Attributes:
        case: "whole", "between", "larger" or "elongated".
        sentence: what was measured where this was so.
        draw: options of nats-draw to try first; none where the plain detector is to be trained.
    """

    case: str
    sentence: str
    draw: Sequence[str] = ()


@dataclass(frozen=True)
class Look:
    """What :func:`look` finds.

    Attributes:
        levels: name → how far it sees.
        objects: None if no boxes are given.
        verdict: likewise.
    """

    levels: Mapping[str, Extent]
    objects: Optional[Objects] = None
    verdict: Optional[Verdict] = field(default=None)

    @property
    def largest(self) -> str:
        """The level that sees furthest."""
        return furthest(self.levels)

    def report(self) -> str:
        """The tables, and the verdict in one sentence."""
        rows = [
            (n, f"{'over ' if e.cut else ''}{e.height}", f"{'over ' if e.cut else ''}{e.width}")
            for n, e in self.levels.items()
        ]
        text = _table(rows, ["level sees, px", "height", "width"])
        if self.objects is None:
            return text
        objects = self.objects
        rows = [
            (name, *(f"{value:.{digits}f}" for value in np.quantile(values, (0.1, 0.5, 0.9))))
            for name, values, digits in (
                ("height", objects.heights, 0),
                ("width", objects.widths, 0),
                ("longer side", objects.longer, 0),
                ("longer / shorter side", objects.aspects, 1),
            )
        ]
        text += "\n\n" + _table(rows, ["objects on the input, px", "10 %", "half", "90 %"])
        text += (
            f"\n\n{len(objects.boxes)} objects; {objects.wider:.0%} are wider than tall, "
            f"{objects.taller:.0%} taller than wide."
        )
        return f"{text}\n\n{self.verdict.sentence}"


def furthest(levels: Mapping[str, Extent]) -> str:
    """The level of the largest field."""
    return max(levels, key=lambda name: levels[name].height * levels[name].width)


def look(
    network: nn.Module,
    images: Sequence[torch.Tensor],
    boxes: Optional[np.ndarray] = None,
    levels: Sequence[str] = (),
) -> Look:
    """How far each level of a network sees, how large the objects are, and what follows.

    Args:
        network: its backbone, best with trained weights; takes (B, 3, H, W) of any size that is a
            multiple of 256.
        images: each (3, h, w), resized and normalised as the network expects. A few are enough.
        boxes: (N, 4), x0 y0 x1 y1 in pixels of the resized images, of all the data; None if there
            are none.
        levels: paths of the network's parts to look at, such as "layer3". (): all feature maps that
            it returns, or of a classifier the residual stages.

    Raises:
        NATSError: see :func:`.receptive_field.field_extents`; or the boxes are malformed.
    """
    extents = field_extents(network, images, levels)
    if boxes is None:
        return Look(extents)
    objects = Objects(_checked(boxes))
    return Look(extents, objects, verdict(objects, extents[furthest(extents)]))


def _checked(boxes: np.ndarray) -> np.ndarray:
    boxes = np.asarray(boxes, dtype=float)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes):
        raise NATSError(f"boxes of shape {boxes.shape}: expected (N, 4), x0 y0 x1 y1, at least one")
    if not np.isfinite(boxes).all() or (boxes[:, 2:] <= boxes[:, :2]).any():
        raise NATSError("boxes: expected x0 y0 x1 y1 with x0 < x1 and y0 < y1: some have no size")
    return boxes


def verdict(objects: Objects, extent: Extent) -> Verdict:
    """The measured rule.

    Args:
        extent: of the level that sees furthest.
    """
    times = float(np.median(objects.times(extent)))
    direction = _direction(objects, extent)
    if direction:
        is_wide = direction == "width"
        dilation = f"1x{REACH}" if is_wide else f"{REACH}x1"
        size = np.median(objects.widths if is_wide else objects.heights)
        return Verdict(
            "elongated",
            f"Elongated: half of the objects are {size:.0f} px {'wide' if is_wide else 'tall'} or "
            f"more, {np.median(objects.aspects):.1f} times as long as wide, and the detector sees "
            f"{extent} px: take dilations in that direction, {dilation}; in both such cases that "
            "were measured on real images, they gained AP, 13 on lines of text and 42 on "
            "columns of tables.",
            ("--uniform", dilation),
        )
    if times <= SEEN_WHOLE:
        return Verdict(
            "whole",
            f"Seen whole: half of the objects are at most {times:.2g} times as large as what the "
            f"detector sees ({extent} px): in both such cases that were measured, random dilations "
            "lost AP, 3 and 5.",
        )
    if times > PAYS:
        return Verdict(
            "larger",
            f"Larger: half of the objects are more than {times:.2g} times as large as what the "
            f"detector sees ({extent} px): in all five such cases that were measured, random "
            "dilations gained AP, 4 to 41.",
            ("--random", "--dilations", DRAWN),
        )
    return Verdict(
        "between",
        f"Between: half of the objects are more than {times:.2g} times as large as what the "
        f"detector sees ({extent} px): in both such cases that were measured, of objects "
        "that are not elongated, random dilations gained nothing beyond chance.",
    )


def _direction(objects: Objects, extent: Extent) -> str:
    """ "width" or "height", along which most objects are long and exceed the field; else ""."""
    long = objects.aspects >= LONG
    if long.mean() < MOSTLY_LONG:
        return ""
    lying = objects.widths[long] > objects.heights[long]
    sides: Dict[str, List] = {
        "width": [lying.mean(), objects.widths[long], extent.width],
        "height": [1 - lying.mean(), objects.heights[long], extent.height],
    }
    for name, (share, lengths, seen) in sides.items():
        if share >= SAME_DIRECTION and np.median(lengths) > seen:
            return name
    return ""


def _table(rows: List, headers: List[str]) -> str:
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(rows, headers, disable_numparse=True, colalign=align)
