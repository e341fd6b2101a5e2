"""What trained detectors detect, side by side, beside what there is."""

from typing import Mapping, Sequence, Tuple

import numpy as np
import torch
from PIL import Image

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import get_detection_dataset_dicts
from detectron2.modeling import build_model
from detectron2.utils.visualizer import Visualizer

from ..data.registry import check_datasets, check_same_classes, register_datasets
from ..engine.checkpoint import SafeCheckpointer
from ..engine.machine import set_usable_device
from ..engine.weights import check_same_dilations
from ..errors import NATSError
from ..look.objects import evenly


def detections_picture(
    detectors: Mapping[str, Tuple[CfgNode, str]], count: int, threshold: float
) -> Image.Image:
    """A column of ground truth, then one for each detector; a row for each image.

    Args:
        detectors: name → config and weights. The images are from the DATASETS.TEST of the first.
        count: of images, spread evenly over the data set.
        threshold: lowest score that is drawn.

    Raises:
        NATSError: no data set, classes that differ, or weights that are not of the detector.
    """
    first = next(iter(detectors.values()))[0]
    register_datasets(first)
    if not first.DATASETS.TEST:
        raise NATSError("DATASETS.TEST is empty: name the images' data set")
    check_datasets(first.DATASETS.TEST[:1], "DATASETS.TEST")
    name = first.DATASETS.TEST[0]
    records = evenly(get_detection_dataset_dicts(name, filter_empty=False), count)
    metadata = MetadataCatalog.get(name)
    images = [utils.read_image(record["file_name"], "RGB") for record in records]
    columns = [
        [
            Visualizer(image, metadata).draw_dataset_dict(record).get_image()
            for image, record in zip(images, records)
        ]
    ]
    for cfg, weights in detectors.values():
        columns.append(_drawn(cfg, weights, images, records, metadata, threshold))
    return Image.fromarray(np.hstack([np.vstack(_of_one_width(column)) for column in columns]))


def _drawn(cfg: CfgNode, weights: str, images, records, metadata, threshold: float):
    """Each image with what one detector finds in it."""
    set_usable_device(cfg)
    model = build_model(cfg).eval()
    checkpointer = SafeCheckpointer(model, "")
    loaded = checkpointer.load(weights, checkpointables=[])
    checkpointer.check_complete()
    check_same_dilations(cfg, loaded, weights)
    if loaded.get("classes"):
        classes = metadata.get("thing_classes", [])
        check_same_classes(classes, loaded["classes"], "the images", weights)
    mapper = DatasetMapper(cfg, is_train=False)
    for image, record in zip(images, records):
        with torch.no_grad():
            found = model([mapper(dict(record))])[0]["instances"].to("cpu")
        drawing = Visualizer(image, metadata)
        yield drawing.draw_instance_predictions(found[found.scores >= threshold]).get_image()


def _of_one_width(images: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    """White to the right of those that are narrower."""
    images = list(images)
    width = max(image.shape[1] for image in images)
    missing = [width - image.shape[1] for image in images]
    return [
        np.pad(image, ((0, 0), (0, more), (0, 0)), constant_values=255)
        for image, more in zip(images, missing)
    ]
