"""How far a network sees: its effective receptive field (the paper's Figure 4).

The field of an output is the gradient of its centre with respect to the input, where that is large.
Works on any `nn.Module`, without Detectron2. Shapes: H and W are the input's height and width.
"""

import contextlib
import copy
from dataclasses import dataclass
from typing import Any, Dict, Iterator, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn

from ..errors import NATSError
from ..method.names import residual_stages

SHARE = 0.9
"""A network is said to see what holds this share of its field."""

SIDES = ((256, 8), (512, 4), (1024, 2), (2048, 1))
"""Sides of the inputs that a field is looked for on, in turn, and how many images of each: a large
input costs as much as many small ones."""

FITS = 0.7
"""A field that takes more of the input's side than this may have been cut off by its edge."""


@dataclass(frozen=True)
class Extent:
    """How far an output sees, in pixels of the input.

    Attributes:
        height, width: of the central rectangle that holds 90 % of the field.
        cut: whether the field is larger than the largest input could show.
    """

    height: int
    width: int
    cut: bool = False

    @property
    def sides(self) -> Tuple[str, str]:
        """Height and width as text."""
        bound = "over " if self.cut else ""
        return f"{bound}{self.height}", f"{bound}{self.width}"

    def __str__(self) -> str:
        return f"{self.sides[0]} × {self.width}"


def effective_receptive_fields(
    module: nn.Module,
    images: torch.Tensor,
    levels: Optional[Mapping[str, nn.Module]] = None,
) -> Dict[str, np.ndarray]:
    """What the centre of each level sees of the input.

    This is the gradient of the output at the centre, summed over its channels, with respect to the
    input. Its absolute value is summed over the colours, normalised, and averaged over the images,
    so that all images count equally.

    Args:
        module: in evaluation mode: by batch statistics every position would see all others. No
            parameter gets a gradient.
        images: (B, 3, H, W), normalised as the network expects.
        levels: name → part of `module` whose output is a feature map, or several in a dict or
            list. None: the residual stages.

    Returns:
        Level → field, (H, W), which adds up to 1. The maps of a dict have its keys as names.
    """
    if levels is None:
        levels = _stages(module)
        if not levels:
            raise NATSError(f"{type(module).__name__} has no residual stages: name levels")
    sums: Dict[str, torch.Tensor] = {}
    with _looking_at(levels, images.shape[-2:]) as outputs:
        for image in images:
            x = image[None].clone().requires_grad_(True)
            with torch.enable_grad():
                module(x)
                for name, y in outputs.items():
                    if not y.requires_grad:
                        continue  # a constant: it sees nothing
                    centre = y[..., y.shape[-2] // 2, y.shape[-1] // 2].sum()
                    (gradient,) = torch.autograd.grad(centre, x, retain_graph=True)
                    field = gradient[0].abs().sum(0).cpu()
                    field = field / field.sum().clamp(min=1e-30)
                    sums[name] = sums[name] + field if name in sums else field
            outputs.clear()
    return {name: (field / len(images)).numpy() for name, field in sums.items()}


@contextlib.contextmanager
def _looking_at(
    levels: Mapping[str, nn.Module], size: Sequence[int]
) -> Iterator[Dict[str, torch.Tensor]]:
    """In the block, a forward pass fills the dict that is given: name → (B, C, h, w).

    Args:
        size: (H, W) of the images.
    """
    outputs: Dict[str, torch.Tensor] = {}
    hooks = [
        level.register_forward_hook(
            lambda _, __, y, name=name: outputs.update(_maps(name, y, size))
        )
        for name, level in levels.items()
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _maps(name: str, output: Any, size: Sequence[int]) -> Dict[str, torch.Tensor]:
    """The feature maps in an output: of the image's shape, up to rounding.

    One of 1 × 1 is pooled over the image: it sees all of it. A transformer's logits, (B, layers,
    queries, classes), have four axes, too.
    """
    if torch.is_tensor(output):
        is_map = output.ndim == 4 and min(output.shape[-2:]) > 1
        if is_map:
            (height, width), (h, w) = size, output.shape[-2:]
            is_map = abs(h * width - w * height) <= height + width
        return {name or "output": output} if is_map else {}
    if isinstance(output, (list, tuple)):
        output = {f"{name or 'output'} {i}": part for i, part in enumerate(output)}
    maps = output.items() if isinstance(output, Mapping) else ()
    return {k: v for key, value in maps for k, v in _maps(str(key), value, size).items()}


def returned_levels(network: nn.Module, images: torch.Tensor) -> Dict[str, nn.Module]:
    """The levels of a network, for :func:`effective_receptive_fields`: all maps that it returns.

    Of a network that returns none, such as a classifier, the residual stages.

    Args:
        images: (B, 3, H, W).
    """
    with _looking_at({"": network}, images.shape[-2:]) as outputs, torch.no_grad():
        network(images[:1])
    return {"": network} if outputs else _stages(network)


def _stages(network: nn.Module) -> Dict[str, nn.Module]:
    return {name: network.get_submodule(path) for name, path in residual_stages(network).items()}


# -- sizes ----------------------------------------------------------------------------------------


def central_rectangle(field: np.ndarray, share: float = SHARE) -> Tuple[int, int]:
    """Height and width in pixels of the central rectangle that contains `share` of a field, (H, W).

    Of all central rectangles, the one whose rows hold as much as its columns, so that neither side
    is favoured: the rows' share of the field and the columns' are the same s, as small as will do.
    If the field is the same along height and width, this is the smallest such square.
    """
    rows, columns = _distances(field)
    # quadrants folded onto each other: mass[i, j] lies within distances i and j of the centre
    mass = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(mass, (rows[:, None], columns[None, :]), field.astype(np.float64))
    mass = mass.cumsum(0).cumsum(1)
    mass /= mass[-1, -1]
    per_rows, per_columns = mass[:, -1], mass[-1, :]
    # equal sums may differ in their last bits, by the order in which they were added
    slack = 1e-9
    for s in np.unique(np.concatenate([per_rows, per_columns])):
        i, j = (int(np.searchsorted(sums, s - slack)) for sums in (per_rows, per_columns))
        if mass[i, j] >= share - slack:
            return 2 * i + 1, 2 * j + 1
    return 2 * len(per_rows) - 1, 2 * len(per_columns) - 1


def _distances(field: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Each row's and each column's distance from the centre."""
    height, width = field.shape
    return np.abs(np.arange(height) - height // 2), np.abs(np.arange(width) - width // 2)


def field_extents(
    network: nn.Module,
    images: Sequence[torch.Tensor],
    levels: Sequence[str] = (),
    sides: Sequence[Tuple[int, int]] = SIDES,
) -> Dict[str, Extent]:
    """How far each level sees, measured on inputs as large as its field needs.

    Args:
        network: takes (B, 3, H, W) on the device of its parameters. A copy of it is looked at.
        images: each (3, h, w) of any size, normalised as the network expects. Their centres are
            seen; where the input is larger, they are mirrored at their edges.
        levels: paths of parts of the network. (): all feature maps that it returns; or if it
            returns none, its residual stages.
        sides: (side, number of images) of each input to try.

    Returns:
        Level → extent, in the network's order.

    Raises:
        NATSError: no images, no such level, or the network returns no feature maps.
    """
    if not len(images):
        raise NATSError("no images: give one or more to look at")
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    # without gradients of the weights, a pass keeps a third of the activations
    network = copy.deepcopy(network).eval().requires_grad_(False)
    found: Dict[str, Extent] = {}
    try:
        parts = {path: network.get_submodule(path) for path in levels}
    except AttributeError as error:
        raise NATSError(f"no such level: {error}") from None
    for side, count in sides:
        batch = torch.stack([mirrored(image, side) for image in images[:count]]).to(device)
        parts = parts or returned_levels(network, batch)
        fields = effective_receptive_fields(network, batch, parts)
        if not fields:
            raise NATSError(f"{type(network).__name__}: no feature maps to look at: name --levels")
        for name, field in fields.items():
            height, width = central_rectangle(field)
            if name not in found or found[name].cut:
                found[name] = Extent(height, width, max(height, width) > FITS * side)
        if not any(extent.cut for extent in found.values()):
            break
    return found


def mirrored(image: torch.Tensor, side: int) -> torch.Tensor:
    """The central square of an image, (C, h, w) → (C, side, side); mirrored where it is smaller."""
    for dim in (-2, -1):
        size = image.shape[dim]
        places = (torch.arange(side) - (side - size) // 2) % (2 * size)
        image = image.index_select(dim, torch.where(places < size, places, 2 * size - 1 - places))
    return image
