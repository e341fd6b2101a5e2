"""The embedded data set, and the tiny pretrained classifier that goes with it.

Synthetic scenes in COCO format: coloured shapes of five classes on a grey textured background.
Colour and texture of an object say nothing about its class; only its outline does. Objects range
from a fifth of the image's width to nearly all, and are up to three times as long as wide. So a
network has to see much of an object to name it, and receptive fields of several sizes and aspect
ratios are of use.

The scenes are made on first use. Nothing is downloaded.
"""

import colorsys
import hashlib
import json
import logging
import math
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
from iopath.common.file_io import file_lock
from PIL import Image, ImageDraw

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathHandler, PathManager

from ..errors import NATSError

__all__ = [
    "CLASSES",
    "SPLITS",
    "embedded_weights",
    "ensure_embedded_dataset",
    "register_embedded_datasets",
    "render_scene",
    "write_embedded_dataset",
]

CLASSES = ("disc", "box", "triangle", "cross", "hourglass")

SPLITS = {"train": 400, "calibration": 200, "val": 100}
"""Number of images of each split; the data set's names are ``nats_embedded_<split>``."""

SEED = 2019

VERSION = 1
"""Raise it with every change that alters the scenes: sets made by another version are made anew."""

IMAGE_SIZES = ((128, 128), (112, 128), (128, 112))
"""(height, width) of the scenes; all three shapes, so that aspect-ratio grouping has work to do."""

OBJECT_SIZES = (28, 80)
"""Smallest and largest square root of width times height of an object, in pixels."""

WEIGHTS_NAME = "embedded_r50.pth"

# Made by: python tools/pretrain_embedded.py
WEIGHTS_SHA256 = "869169e2ba686e4cd3a91d69ea0377fd457f55d1dbb73cd05e651089c6310805"

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------- scenes


def render_scene(rng, height, width, max_objects=3, sizes=OBJECT_SIZES):
    """
    Draw one scene.

    Args:
        rng (np.random.Generator): the only source of chance.
        height, width (int): size of the image in pixels, at least 32.
        max_objects (int): the scene holds one to this many objects.
        sizes (tuple[float, float]): range of the objects' sizes, as :data:`OBJECT_SIZES`. An object
            that would be wider or higher than the image is cut down to it.

    Returns:
        (ndarray, list[tuple[int, ndarray]]): the image, uint8 of shape (height, width, 3) in RGB;
        and for each object its index in :data:`CLASSES` and its outline, float of shape (points, 2)
        with (x, y) in pixels. Outlines lie inside the image; an object may cover a little of an
        earlier one.
    """
    image = _background(rng, height, width)
    objects = []
    boxes = []
    for _ in range(rng.integers(1, max_objects + 1)):
        box = _place(rng, height, width, sizes, boxes)
        if box is None:
            continue
        label = int(rng.integers(len(CLASSES)))
        x0, y0, x1, y1 = box
        outline = _outline(rng, CLASSES[label]) * (x1 - x0, y1 - y0) + (x0, y0)
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


def _place(rng, height, width, sizes, boxes):
    """A box (x0, y0, x1, y1) that overlaps none of ``boxes`` by much; None if there is no room."""
    for _ in range(20):
        size = math.exp(rng.uniform(*np.log(sizes)))
        stretch = math.exp(rng.uniform(-0.5, 0.5) * math.log(3))
        w, h = min(size * stretch, width - 4), min(size / stretch, height - 4)
        x0, y0 = rng.uniform(1, width - 1 - w), rng.uniform(1, height - 1 - h)
        box = (x0, y0, x0 + w, y0 + h)
        if all(_overlap(box, other) < 0.1 for other in boxes):
            return box
    return None


def _overlap(a, b):
    """Area that two boxes share, as a fraction of the smaller one's."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _outline(rng, name):
    """The outline of a class in the unit square, randomly turned where that makes a difference."""
    if name == "disc":
        angle = np.linspace(0, 2 * math.pi, 32, endpoint=False)
        return 0.5 + 0.5 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    a, b = 0.32, 0.68
    points = {
        "box": [(0, 0), (1, 0), (1, 1), (0, 1)],
        "triangle": [(0.5, 0), (1, 1), (0, 1)],
        "cross": [
            *[(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b)],
            *[(b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)],
        ],
        "hourglass": [(0, 0), (1, 0), (b, 0.5), (1, 1), (0, 1), (a, 0.5)],
    }[name]
    points = np.array(points, dtype=float)
    if rng.random() < 0.5:
        points[:, 1] = 1 - points[:, 1]
    if rng.random() < 0.5:
        points = points[:, ::-1]
    return points


def _paint(rng, image, outline):
    """Fill an outline, in place, with a strong colour that carries a faint pattern."""
    height, width = image.shape[:2]
    mask = Image.new("1", (width, height))
    ImageDraw.Draw(mask).polygon([tuple(point) for point in outline.tolist()], fill=1)
    mask = np.asarray(mask)
    colour = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.75, 1), rng.uniform(0.75, 1))
    shade = 225 + 30 * _stripes(rng, height, width)
    image[mask] = shade[mask][:, None] * np.array(colour)


# --------------------------------------------------------------------------------------- COCO files


def write_embedded_dataset(folder, counts=SPLITS, seed=SEED):
    """
    Write all splits: ``<folder>/<split>/<number>.png`` and ``<folder>/instances_<split>.json``.

    Args:
        folder (str): an existing folder.
        counts (dict[str, int]): number of images of each split.
        seed (int): an image depends on it, on its split's place in ``counts`` and on its own
            number, so no image is drawn twice and a longer split begins like a shorter one.
    """
    for split_index, (split, count) in enumerate(counts.items()):
        os.makedirs(os.path.join(folder, split))
        images, annotations = [], []
        for number in range(count):
            rng = np.random.default_rng([seed, split_index, number])
            height, width = IMAGE_SIZES[rng.integers(len(IMAGE_SIZES))]
            image, objects = render_scene(rng, height, width)
            # Ids differ between the splits too, so that splits can be told apart by their ids.
            image_id = 100_000 * (split_index + 1) + number
            file_name = f"{image_id}.png"
            Image.fromarray(image).save(os.path.join(folder, split, file_name))
            images.append(dict(id=image_id, file_name=file_name, height=height, width=width))
            for label, outline in objects:
                annotation = dict(
                    id=100_000 * (split_index + 1) + len(annotations),
                    image_id=image_id,
                    category_id=label + 1,
                    iscrowd=0,
                )
                annotations.append({**annotation, **_geometry(outline)})
        content = {
            "info": {"description": f"detectron2-nats embedded data set, {split}"},
            "images": images,
            "annotations": annotations,
            "categories": [dict(id=i, name=name) for i, name in enumerate(CLASSES, start=1)],
        }
        with open(os.path.join(folder, f"instances_{split}.json"), "w") as f:
            json.dump(content, f)


def _geometry(outline):
    """COCO's fields for an outline: bbox [x, y, w, h], area, segmentation; px and px²."""
    points = outline.round(2)
    x, y = points.T
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    return dict(
        bbox=[x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
        area=round(float(area), 2),
        segmentation=[points.reshape(-1).tolist()],
    )


def ensure_embedded_dataset():
    """
    Make the embedded data set unless it is there, which takes a few seconds.

    It lies in ``$DETECTRON2_DATASETS/nats_embedded`` (``datasets/nats_embedded`` by default). It is
    written aside and renamed at the end under a lock: a killed run leaves nothing half-made, and of
    several processes that start together one makes it while the others wait.

    Returns:
        str: the folder.
    """
    root = os.getenv("DETECTRON2_DATASETS", "datasets")
    folder = os.path.join(root, "nats_embedded")
    if _is_current(folder):
        return folder
    os.makedirs(root, exist_ok=True)
    with file_lock(folder):
        if _is_current(folder):
            return folder
        logger.info(f"Making the embedded data set in {folder} (a few seconds) ...")
        partial_folder = os.path.join(root, ".nats_embedded.partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        os.makedirs(partial_folder)
        write_embedded_dataset(partial_folder, SPLITS)
        with open(os.path.join(partial_folder, "made_by.json"), "w") as f:
            json.dump(_maker(), f)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial_folder, folder)
    return folder


def _maker():
    """What decides the content of the data set, as kept beside it."""
    return {"generator": "detectron2-nats", "version": VERSION, "seed": SEED, "counts": SPLITS}


def _is_current(folder):
    try:
        with open(os.path.join(folder, "made_by.json")) as f:
            return json.load(f) == _maker()
    except (OSError, ValueError):
        return False


# ------------------------------------------------------------------------------------------ weights


def embedded_weights():
    """
    Path of the tiny ResNet-50 (stem 32, width per group 16) that tells the embedded classes apart.

    Returns:
        str: a Detectron2 checkpoint with the backbone's weights in half precision. In a config it
        is ``MODEL.WEIGHTS: nats://embedded_r50.pth``.

    Raises:
        NATSError: the file is missing or is not the one that this version was made with.
    """
    path = Path(__file__).with_name(WEIGHTS_NAME)
    if not path.is_file():
        raise NATSError(f"{path} is missing. Get the whole repository again and reinstall.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise NATSError(
            f"{path} is damaged: its SHA-256 is {digest}, expected {WEIGHTS_SHA256}. "
            "Restore the file from the repository."
        )
    return str(path)


# ------------------------------------------------------------------------------------- registration


class NATSPathHandler(PathHandler):
    """
    Files of this package under ``nats://`` names, for Detectron2's PathManager (reading only).

    ``nats://embedded_r50.pth`` is :func:`embedded_weights`; ``nats://nats_embedded/...`` lies in
    the folder of :func:`ensure_embedded_dataset`, made when a name in it is first resolved.
    """

    PREFIX = "nats://"

    def _get_supported_prefixes(self):
        return [self.PREFIX]

    def _get_local_path(self, path, force=False, **kwargs):
        name = path[len(self.PREFIX) :]
        if name == WEIGHTS_NAME:
            return embedded_weights()
        top, _, rest = name.partition("/")
        if top == "nats_embedded":
            return os.path.join(ensure_embedded_dataset(), rest)
        raise NATSError(
            f"Unknown name {path}. There are {self.PREFIX}{WEIGHTS_NAME} and "
            f"{self.PREFIX}nats_embedded/..."
        )

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        return PathManager.open(self._get_local_path(path), mode, buffering, **kwargs)

    def _exists(self, path, **kwargs):
        return os.path.exists(self._get_local_path(path))

    def _isfile(self, path, **kwargs):
        return os.path.isfile(self._get_local_path(path))

    def _isdir(self, path, **kwargs):
        return os.path.isdir(self._get_local_path(path))


def register_embedded_datasets():
    """
    Register ``nats_embedded_{train,calibration,val}`` and the ``nats://`` names, once.

    Nothing is made yet. The metadata names files by ``nats://``, which Detectron2 resolves wherever
    it reads them: an evaluator works too when it is built before any data is loaded.
    """
    PathManager.register_handler(NATSPathHandler(), allow_override=True)
    for split in SPLITS:
        name = f"nats_embedded_{split}"
        if name in DatasetCatalog:
            continue
        json_file = f"{NATSPathHandler.PREFIX}nats_embedded/instances_{split}.json"
        image_root = f"{NATSPathHandler.PREFIX}nats_embedded/{split}"
        DatasetCatalog.register(name, partial(_load, name, json_file, image_root))
        MetadataCatalog.get(name).set(
            json_file=json_file,
            image_root=image_root,
            evaluator_type="coco",
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
        )


def _load(name, json_file, image_root):
    # Real paths for the images: a data loader's worker then needs no handler to read them.
    return load_coco_json(json_file, PathManager.get_local_path(image_root), name)
