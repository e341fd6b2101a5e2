"""Data sets that are drawn on first use, and the weights of a tiny classifier for one of them.

- ``nats_embedded``: coloured shapes of five classes on a grey textured background. Only the outline
  of an object tells its class, not its colour or texture. For tests.
- ``nats_bars_lying``, ``nats_bars_standing``, ``nats_bars_short``: bars whose class is the ordered
  pair of the colours of their two ends. They are made so that the right answer of a search is
  known. For horizontal bars a network must see far along the width, for upright ones along the
  height. Of short bars a plain network sees both ends.

All are in COCO format. Nothing is downloaded.
"""

import json
import logging
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Mapping, Tuple

import numpy as np
from PIL import Image

from .scenes import BAR_CLASSES, SHAPE_CLASSES, render_bars, render_shapes

SEED = 2019


@dataclass(frozen=True)
class EmbeddedSet:
    """A data set that is drawn.

    Attributes:
        classes: their names, in the order of their indices.
        splits: name of a split → its number of images. It is registered as ``NAME_SPLIT``.
        render: draws a scene, see :func:`.scenes.render_scene`.
        seed: the first numbers in the seed of each image.
    """

    classes: Tuple[str, ...]
    splits: Mapping[str, int]
    render: Callable
    seed: Tuple[int, ...]


def _bars(index: int, **how) -> EmbeddedSet:
    splits = {"train": 400, "calibration": 200, "val": 200}
    return EmbeddedSet(BAR_CLASSES, splits, partial(render_bars, **how), (SEED, index))


SETS = {
    "nats_embedded": EmbeddedSet(
        SHAPE_CLASSES, {"train": 400, "calibration": 200, "val": 100}, render_shapes, (SEED,)
    ),
    "nats_bars_lying": _bars(1, lengths=(72, 124)),
    "nats_bars_standing": _bars(2, lengths=(72, 124), standing=True),
    "nats_bars_short": _bars(3, lengths=(20, 40)),
}

WEIGHTS = Path(__file__).with_name("embedded_r50.pth")
"""Backbone weights of a tiny ResNet-50 that tells the embedded shapes apart, in half precision.

A Detectron2 checkpoint, made by ``tools/pretrain_embedded.py``. In a config it is
``MODEL.WEIGHTS: nats://embedded_r50.pth``.
"""

logger = logging.getLogger(__name__)


def write_embedded_dataset(folder: str, dataset: EmbeddedSet) -> None:
    """Write all splits: ``<folder>/<split>/<id>.png`` and ``<folder>/instances_<split>.json``.

    An image depends only on the set's seed, on its split's place among the splits, and on its
    number in the split. So no image is drawn twice, and a longer split begins like a shorter one.

    Args:
        folder: an existing folder.
    """
    for split_index, (split, count) in enumerate(dataset.splits.items()):
        os.makedirs(os.path.join(folder, split))
        images, annotations = [], []
        for number in range(count):
            rng = np.random.default_rng([*dataset.seed, split_index, number])
            image, objects = dataset.render(rng)
            height, width = image.shape[:2]
            # Ids are unique over all splits, so that an id tells the split.
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
            "categories": [
                dict(id=i, name=name) for i, name in enumerate(dataset.classes, start=1)
            ],
        }
        with open(os.path.join(folder, f"instances_{split}.json"), "w") as f:
            json.dump(content, f)


def _geometry(outline):
    """COCO's fields for an outline in pixels: bbox [x, y, w, h], area, segmentation."""
    points = outline.round(2)
    x, y = points.T
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    return dict(
        bbox=[x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
        area=round(float(area), 2),
        segmentation=[points.reshape(-1).tolist()],
    )


def ensure_embedded_dataset(name: str = "nats_embedded") -> str:
    """Draw an embedded data set if it is not there yet, which takes a few seconds.

    It is drawn in a folder of another name and then renamed: a killed process leaves no incomplete
    data set, and of processes that start together the first one's is taken. One that is there is
    not compared with what would be drawn now.

    Args:
        name: a key of :data:`SETS`.

    Returns:
        The folder, ``$DETECTRON2_DATASETS/NAME`` (by default ``datasets/NAME``).
    """
    root = os.getenv("DETECTRON2_DATASETS", "datasets")
    folder = os.path.join(root, name)
    if os.path.isdir(folder):
        return folder
    logger.info(f"Making the embedded data set in {folder} (a few seconds) ...")
    os.makedirs(root, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}.") as scratch:
        drawn = os.path.join(scratch, name)
        os.mkdir(drawn)
        write_embedded_dataset(drawn, SETS[name])
        try:
            os.rename(drawn, folder)
        except OSError:
            if not os.path.isdir(folder):  # else another process was faster
                raise
    return folder
