"""Draw scenes: shapes that differ in their outline, and bars that differ in their two ends.

Each function depends on nothing but its arguments: the random generator is the only source of
chance. Outlines are float arrays of shape (points, 2) with (x, y) in pixels.
"""

import colorsys
import math
from typing import List, Tuple

import numpy as np
from PIL import Image, ImageDraw

SHAPE_CLASSES = ("disc", "box", "triangle", "cross", "hourglass")

IMAGE_SIZES = ((128, 128), (112, 128), (128, 112))
"""(height, width) of the scenes: square, wide and tall, so that aspect-ratio grouping matters."""

OBJECT_SIZES = (28, 80)
"""Range of the square root of a shape's width times height, in pixels."""

_MARKERS = {"red": (215, 40, 40), "green": (40, 175, 60), "blue": (45, 80, 220)}

BAR_CLASSES = tuple(f"{a}-{b}" for a in _MARKERS for b in _MARKERS)
"""The colours of a bar's two ends, from left to right or from top to bottom."""

Scene = Tuple[np.ndarray, List[Tuple[int, np.ndarray]]]
"""The image, (height, width, 3) uint8 in RGB; and (class index, outline) of each object."""


# -- shapes --------------------------------------------------------------------------------------


def render_shapes(rng: np.random.Generator) -> Scene:
    """A scene of one of the :data:`IMAGE_SIZES`, see :func:`render_scene`."""
    return render_scene(rng, *IMAGE_SIZES[rng.integers(len(IMAGE_SIZES))])


def render_scene(
    rng: np.random.Generator,
    height: int,
    width: int,
    max_objects: int = 3,
    sizes: Tuple[float, float] = OBJECT_SIZES,
) -> Scene:
    """Draw a scene of one to `max_objects` shapes. Classes are indices in :data:`SHAPE_CLASSES`.

    Outlines are inside the image. An object may cover a little of an earlier one.

    Args:
        height, width: of the image, in pixels; at least 32.
        sizes: range of the objects' sizes, as :data:`OBJECT_SIZES`. An object that would be wider
            or higher than the image is cut down to it.
    """

    def size():
        root = math.exp(rng.uniform(*np.log(sizes)))
        stretch = math.exp(rng.uniform(-0.5, 0.5) * math.log(3))
        return min(root * stretch, width - 4), min(root / stretch, height - 4)

    image = _background(rng, height, width)
    objects, boxes = [], []
    for _ in range(rng.integers(1, max_objects + 1)):
        box = _place(rng, height, width, size, boxes, 0.1)
        if box is None:
            continue
        label = int(rng.integers(len(SHAPE_CLASSES)))
        x0, y0, x1, y1 = box
        outline = _outline(rng, SHAPE_CLASSES[label]) * (x1 - x0, y1 - y0) + (x0, y0)
        _paint(rng, image, outline)
        boxes.append(box)
        objects.append((label, outline))
    return np.rint(image).astype(np.uint8), objects


def _background(rng, height, width):
    """Grey cloth: blotches, weave and grain. Returns float32 of shape (height, width, 3)."""
    blotches = Image.fromarray(rng.uniform(-30, 30, (5, 5)).astype(np.float32))
    grey = np.asarray(blotches.resize((width, height), Image.Resampling.BICUBIC))
    grey = grey + rng.uniform(80, 170) + rng.normal(0, 8, (height, width))
    grey += rng.uniform(4, 12) * _stripes(rng, height, width)
    tint = rng.uniform(0.92, 1.08, 3)
    return np.clip(grey[:, :, None] * tint, 0, 255).astype(np.float32)


def _stripes(rng, height, width):
    """A plane wave of random direction and of 4 to 10 px length, with values in [-1, 1]."""
    angle, frequency = rng.uniform(0, math.pi), 2 * math.pi / rng.uniform(4, 10)
    y, x = np.mgrid[:height, :width]
    return np.sin(frequency * (x * math.cos(angle) + y * math.sin(angle)) + rng.uniform(0, 6.28))


def _place(rng, height, width, size, boxes, overlap):
    """A box (x0, y0, x1, y1) of (w, h) = size() that overlaps each of `boxes` by at most so much of
    the smaller one; None if there is no room."""
    for _ in range(20):
        w, h = size()
        x0, y0 = rng.uniform(1, width - 1 - w), rng.uniform(1, height - 1 - h)
        box = (x0, y0, x0 + w, y0 + h)
        if all(_overlap(box, other) <= overlap for other in boxes):
            return box
    return None


def _overlap(a, b):
    """The area that two boxes share, as a fraction of the smaller box."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _outline(rng, name):
    """The outline of a class in the unit square, in a random orientation."""
    if name == "disc":
        angle = np.linspace(0, 2 * math.pi, 32, endpoint=False)
        return 0.5 + 0.5 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    a, b = 0.32, 0.68
    points = {
        "box": [(0, 0), (1, 0), (1, 1), (0, 1)],
        "triangle": [(0.5, 0), (1, 1), (0, 1)],
        "cross": list(
            zip([a, b, b, 1, 1, b, b, a, a, 0, 0, a], [0, 0, a, a, b, b, 1, 1, b, b, a, a])
        ),
        "hourglass": [(0, 0), (1, 0), (b, 0.5), (1, 1), (0, 1), (a, 0.5)],
    }[name]
    points = np.array(points, dtype=float)
    if rng.random() < 0.5:
        points[:, 1] = 1 - points[:, 1]
    if rng.random() < 0.5:
        points = points[:, ::-1]
    return points


def _paint(rng, image, outline):
    """Fill an outline with a strong colour and a faint pattern, in place."""
    height, width = image.shape[:2]
    mask = Image.new("1", (width, height))
    ImageDraw.Draw(mask).polygon([tuple(point) for point in outline.tolist()], fill=1)
    mask = np.asarray(mask)
    colour = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.75, 1), rng.uniform(0.75, 1))
    shade = 225 + 30 * _stripes(rng, height, width)
    image[mask] = shade[mask][:, None] * np.array(colour)


# -- bars ----------------------------------------------------------------------------------------


def render_bars(
    rng: np.random.Generator, lengths: Tuple[int, int], standing: bool = False, side: int = 128
) -> Scene:
    """Draw two to five bars whose class is the ordered pair of the colours of their two ends.

    Nothing else tells the class, so a network must see both ends of a bar. How far it has to see,
    and in which direction, is therefore known. Classes are indices in :data:`BAR_CLASSES`.

    Args:
        lengths: shortest and longest bar, in pixels.
        standing: vertical bars; else horizontal ones.
        side: width and height of the image, in pixels.
    """

    def size():
        length, thickness = rng.uniform(*lengths), rng.uniform(14, 22)
        return (thickness, length) if standing else (length, thickness)

    image = _background(rng, side, side)
    objects, boxes = [], []
    for _ in range(rng.integers(2, 6)):
        box = _place(rng, side, side, size, boxes, 0)
        if box is None:
            continue
        label = int(rng.integers(len(BAR_CLASSES)))
        _paint_bar(rng, image, box, standing, BAR_CLASSES[label].split("-"))
        boxes.append(box)
        x0, y0, x1, y1 = box
        objects.append((label, np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])))
    return np.rint(image).astype(np.uint8), objects


def _paint_bar(rng, image, box, standing, markers):
    """Draw a light bar with a coloured square at each end, in place."""
    x0, y0, x1, y1 = (round(value) for value in box)
    part = image[y0:y1, x0:x1]  # a view
    part[:] = (rng.uniform(180, 225) + 15 * _stripes(rng, *part.shape[:2]))[:, :, None]
    if standing:
        part = part.swapaxes(0, 1)  # so that the length is the second axis
    marker = min(part.shape[0], part.shape[1] // 3)
    for colour, end in zip(markers, (slice(0, marker), slice(-marker, None))):
        part[:, end] = np.array(_MARKERS[colour]) * rng.uniform(0.85, 1.15)
    np.clip(image, 0, 255, out=image)
