"""What trained detectors detect, side by side."""

from typing import List, Mapping, Sequence, Tuple

import torch
from matplotlib.figure import Figure
from torchvision.ops import nms

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import get_detection_dataset_dicts
from detectron2.modeling import build_model

from ..data.registry import check_datasets, check_same_classes, register_datasets
from ..engine.checkpoint import SafeCheckpointer
from ..engine.machine import set_usable_device
from ..engine.weights import check_same_dilations
from ..errors import NATSError
from ..look.objects import evenly
from .pictures import plot_detections

Detection = Tuple[Sequence[float], int, float]
"""Box (x0, y0, x1, y1) in pixels of the image file, class index, score."""


def detections_figure(
    detectors: Mapping[str, Tuple[CfgNode, str]], images: int, threshold: float
) -> Figure:
    """A picture of what each detector detects on the same images.

    Args:
        detectors: name → config and weights. The images are from the DATASETS.TEST of the first.
        images: their number, spread evenly over the data set.
        threshold: lowest score that is drawn.

    Raises:
        NATSError: no data set, classes that differ, or weights that are not of the detector.
    """
    first = next(iter(detectors.values()))[0]
    register_datasets(first)
    if not first.DATASETS.TEST:
        raise NATSError("DATASETS.TEST is empty: name the images' data set")
    name = first.DATASETS.TEST[0]
    check_datasets([name], "DATASETS.TEST")
    records = evenly(get_detection_dataset_dicts(name, filter_empty=False), images)
    classes = MetadataCatalog.get(name).get("thing_classes", [])
    return plot_detections(
        [utils.read_image(record["file_name"], "RGB") for record in records],
        {
            detector: _detect(cfg, weights, records, classes, threshold)
            for detector, (cfg, weights) in detectors.items()
        },
        classes,
    )


def _detect(
    cfg: CfgNode, weights: str, records: Sequence[dict], classes: Sequence[str], threshold: float
) -> List[List[Detection]]:
    """For each image what is detected; of boxes that overlap by more than a half, the best."""
    set_usable_device(cfg)
    model = build_model(cfg).eval()
    checkpointer = SafeCheckpointer(model, "")
    loaded = checkpointer.load(weights, checkpointables=[])
    checkpointer.check_complete()
    check_same_dilations(cfg, loaded, weights)
    if loaded.get("classes"):
        check_same_classes(classes, loaded["classes"], "the images", weights)
    mapper, per_image = DatasetMapper(cfg, is_train=False), []
    for record in records:
        with torch.no_grad():
            found = model([mapper(dict(record))])[0]["instances"].to("cpu")
        found = found[found.scores >= threshold]
        found = found[nms(found.pred_boxes.tensor, found.scores, 0.5)]
        boxes = found.pred_boxes.tensor.tolist()
        per_image.append(list(zip(boxes, found.pred_classes.tolist(), found.scores.tolist())))
    return per_image
