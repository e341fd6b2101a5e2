"""How large the objects of a data set are, on the images as a network is given them."""

import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

from ..data.annotations import Needs, read_annotations
from ..data.images import misread
from ..errors import NATSError, one_line


@dataclass(frozen=True)
class Record:
    """An image and its objects.

    Attributes:
        path: of the image file.
        height, width: of the image, in pixels.
        boxes: (n, 4), x0 y0 x1 y1 in pixels of the image; no crowds.
    """

    path: str
    height: int
    width: int
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))


@dataclass(frozen=True)
class InputSize:
    """Detectron2's ResizeShortestEdge, and torchvision's: what becomes of an image's size.

    Attributes:
        shorter: what the shorter side is resized to.
        longest: the longer side's limit, to which a longer image is shrunk.
    """

    shorter: int
    longest: int

    def scale(self, height: int, width: int) -> float:
        """Pixels of the network's input for one of the image."""
        if not self.shorter:  # Detectron2: as they are
            return 1.0
        return min(self.shorter / min(height, width), self.longest / max(height, width))


def read_coco(json_file: str, folder: str) -> List[Record]:
    """The images of a COCO annotation file that have objects, with the objects.

    Raises:
        NATSError: see :func:`.annotations.read_annotations`; or it has no objects.
    """
    content = read_annotations(json_file, Needs(to_train=True)).content
    boxes: Dict[Any, List[tuple]] = {}
    for annotation in content["annotations"]:
        if not annotation["iscrowd"]:
            x, y, w, h = annotation["bbox"]
            boxes.setdefault(annotation["image_id"], []).append((x, y, x + w, y + h))
    return [
        Record(
            os.path.join(folder, image["file_name"]),
            image["height"],
            image["width"],
            np.array(boxes[image["id"]], dtype=float),
        )
        for image in content["images"]
        if image["id"] in boxes
    ]


def boxes_on_input(records: Sequence[Record], size: InputSize) -> np.ndarray:
    """(N, 4): all objects, in pixels of the network's input."""
    scaled = [size.scale(r.height, r.width) * r.boxes.reshape(-1, 4) for r in records]
    return np.concatenate(scaled) if scaled else np.zeros((0, 4))


def evenly(records: Sequence[Any], count: int) -> List[Any]:
    """`count` of them, spread evenly."""
    chosen = np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int)
    return [records[i] for i in chosen]


def image_on_input(record: Record, size: InputSize) -> np.ndarray:
    """(H, W, 3) uint8, RGB, as the network is given it.

    Raises:
        NATSError: the file cannot be read, or has another size than annotated.
    """
    try:
        with open(record.path, "rb") as file:  # given the name, Pillow 12.3 garbles turned TIFFs
            image = Image.open(file)
            if misread(image):
                raise ValueError(misread(image))
            shown = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises all kinds of errors for a damaged file
        raise NATSError(
            f"{record.path}: cannot be read: {getattr(error, 'strerror', None) or one_line(error)}"
        ) from None
    if shown.size != (record.width, record.height):
        raise NATSError(
            f"{record.path}: it has {shown.width}×{shown.height} px, the annotations say "
            f"{record.width}×{record.height}"
        )
    scale = size.scale(record.height, record.width)
    width, height = (max(1, round(scale * side)) for side in shown.size)
    return np.array(shown.resize((width, height), Image.Resampling.BILINEAR))


def normalised(
    image: np.ndarray, mean: Sequence[float], deviation: Sequence[float], channels: str = "RGB"
) -> torch.Tensor:
    """(H, W, 3) uint8, RGB → (3, H, W).

    Args:
        mean, deviation: of each channel, for values 0 to 255, in the order of `channels`.
        channels: "RGB" or "BGR", as the network expects.
    """
    ordered = image if channels == "RGB" else image[..., ::-1]
    pixels = torch.from_numpy(ordered.astype(np.float32)).permute(2, 0, 1)
    shape = (3, 1, 1)
    return (pixels - torch.tensor(mean).view(shape)) / torch.tensor(deviation).view(shape)
