"""Does a detector see as far as its objects are large? What to do is read off both, by a rule.

The rule is that of the measured cases (study/README.md). It needs no training, and no Detectron2.
"""

from dataclasses import dataclass
from typing import Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

from ..errors import NATSError
from .receptive_field import Extent, field_extents

# An object's size is compared with the field in the direction in which it exceeds it most. For a
# square field this is its longer side.
SEEN_WHOLE = 1.0
"""Up to this median, random dilations lost AP."""

PAYS = 2.0
"""Above this median they gained. Between, they gained nothing beyond chance."""

LONG = 3.0
"""An object this many times as long as wide is long."""

MOSTLY_LONG = 0.5
"""Share of the objects that are long where a direction is recommended. Of the sets on which one
paid, half and more are long; of the others, a fifth at most."""

SAME_DIRECTION = 0.8
"""Share of the long ones that lie in one direction; chosen, not measured."""

REACH = 5
"""The dilation that is recommended along the long side. No other was tried."""

DRAWN = "1x1,3x3,5x5,1x5,5x1"
"""From which random dilations were drawn. The paper's set C does not reach as far, and gained less
where it was tried."""


@dataclass(frozen=True)
class Objects:
    """Sizes of objects on the network's input.

    Args:
        boxes: (N, 4), x0 y0 x1 y1.

    Raises:
        NATSError: of another shape, none, or one without a size.
    """

    boxes: np.ndarray

    def __post_init__(self):
        boxes = np.asarray(self.boxes, dtype=float)
        is_list = boxes.ndim == 2 and boxes.shape[1] == 4 and len(boxes)
        if not is_list or not (np.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all()):
            raise NATSError(
                f"boxes of shape {boxes.shape}: expected (N, 4), one or more x0 y0 x1 y1 with "
                "x0 < x1 and y0 < y1"
            )
        object.__setattr__(self, "boxes", boxes)

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


@dataclass(frozen=True)
class Verdict:
    """What the rule says.

    Attributes:
        sentence: what was measured where this was so.
        draw: options of nats-draw to try first; none where the plain detector is to be trained.
    """

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
    verdict: Optional[Verdict] = None

    def report(self) -> str:
        """The tables, and the verdict in one sentence."""
        rows = [(name, *extent.sides) for name, extent in self.levels.items()]
        text = _table(rows, "level sees, px", "height", "width")
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
        wider, taller = objects.widths > objects.heights, objects.heights > objects.widths
        return (
            f"{text}\n\n{_table(rows, 'objects on the input, px', '10 %', 'half', '90 %')}\n\n"
            f"{len(objects.boxes)} objects; {wider.mean():.0%} are wider than tall, "
            f"{taller.mean():.0%} taller than wide.\n\n{self.verdict.sentence}"
        )


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
        NATSError: see :func:`.receptive_field.field_extents` and :class:`Objects`.
    """
    objects = None if boxes is None else Objects(boxes)
    extents = field_extents(network, images, levels)
    if objects is None:
        return Look(extents)
    furthest = max(extents.values(), key=lambda extent: extent.height * extent.width)
    return Look(extents, objects, verdict(objects, furthest))


def verdict(objects: Objects, extent: Extent) -> Verdict:
    """The measured rule.

    Args:
        extent: of the level that sees furthest.
    """
    direction = _direction(objects, extent)
    if direction:
        side, dilation, sizes = direction
        return Verdict(
            f"Elongated: half of the objects are {np.median(sizes):.0f} px {side} or more, "
            f"{np.median(objects.aspects):.1f} times as long as wide, and the detector sees "
            f"{extent} px: take dilations in that direction, {dilation}. Where this was so, they "
            "gained AP.",
            ("--uniform", dilation),
        )
    sizes = np.maximum(objects.heights / extent.height, objects.widths / extent.width)
    times = float(np.median(sizes))
    than = f"times as large as what the detector sees ({extent} px)"
    if times <= SEEN_WHOLE:
        return Verdict(
            f"Seen whole: half of the objects are at most {times:.2g} {than}. Where this was so, "
            "random dilations lost AP.",
        )
    if times > PAYS:
        return Verdict(
            f"Larger: half of the objects are more than {times:.2g} {than}. Where this was so, "
            "random dilations gained AP.",
            ("--random", "--dilations", DRAWN),
        )
    return Verdict(
        f"Between: half of the objects are more than {times:.2g} {than}. Where this was so, random "
        "dilations gained nothing beyond chance.",
    )


def _direction(objects: Objects, extent: Extent) -> Optional[Tuple[str, str, np.ndarray]]:
    """Along which side most objects are long and exceed the field: the word for it, the dilation,
    and the objects' lengths; None if along neither."""
    long = objects.aspects >= LONG
    if long.mean() < MOSTLY_LONG:
        return None
    is_wide = objects.widths[long] > objects.heights[long]
    for share, word, dilation, sizes, seen in (
        (is_wide.mean(), "wide", f"1x{REACH}", objects.widths, extent.width),
        (1 - is_wide.mean(), "tall", f"{REACH}x1", objects.heights, extent.height),
    ):
        if share >= SAME_DIRECTION and np.median(sizes[long]) > seen:
            return word, dilation, sizes
    return None


def _table(rows: Sequence[Sequence[str]], *headers: str) -> str:
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(rows, headers, disable_numparse=True, colalign=align)
