"""Read images rightly, and look at a data set's image files before a run."""

import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Iterator, List, NamedTuple, Sequence

import numpy as np
from PIL import Image

from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.utils.file_io import PathManager

from ..errors import NATSError, one_line
from .pixels import ORIENTATION, eight_bits, unknown_range

_MOST_LOOKED_AT = 5000  # of a larger data set so many images, spread evenly
_QUARTER_TURNS = (5, 6, 7, 8)

logger = logging.getLogger(__name__)


def read_image(file_name: str, format: str) -> np.ndarray:
    """Detectron2's ``read_image``, (height, width, channels), for two more kinds of file.

    Of images of 16 bits Detectron2 clips the values to 255, so that they come out white. Here the
    whole range of 16 bits becomes that of 8 bits. TIFFs are turned as their EXIF says once; by
    Detectron2 twice, since Pillow does so when it loads them.

    Raises:
        ValueError: the range of its values is unknown (32 bits, or floating point).
    """
    with PathManager.open(file_name, "rb") as file:
        image = eight_bits(Image.open(file))
        return utils.convert_PIL_to_numpy(utils._apply_exif_orientation(image), format)


@contextlib.contextmanager
def _reading_rightly() -> Iterator[None]:
    """Detectron2's mapper looks the function up in its module: there is no other way in."""
    theirs, utils.read_image = utils.read_image, read_image
    try:
        yield
    finally:
        utils.read_image = theirs


class ImageMapper(DatasetMapper):
    """Detectron2's mapper, with :func:`read_image`."""

    def __call__(self, record: dict) -> dict:
        with _reading_rightly():
            return super().__call__(record)


def readable(records: Sequence[dict]) -> List[dict]:
    """Those of a few records whose images can be read; a warning for each of the others.

    Raises:
        NATSError: none can.
    """
    found, faults = [], {}
    for record in records:
        try:
            utils.check_image_size(dict(record), read_image(record["file_name"], "RGB"))
            found.append(record)
        except Exception as error:  # Pillow raises all kinds of errors for a damaged file
            faults[record["file_name"]] = one_line(error)
            logger.warning(
                f"skipping image {record['file_name']}, which cannot be read: {one_line(error)}"
            )
    if not found:
        name, fault = next(iter(faults.items()), ("", "there is none"))
        raise NATSError(f"no image can be read, the first {name}: {fault}")
    return found


class _Look(NamedTuple):
    """What the head of an image file says."""

    fault: str = ""
    turned: bool = False  # EXIF turns or mirrors it, and its size stays as annotated


def _look(record: dict) -> _Look:
    try:
        with PathManager.open(record["file_name"], "rb") as file:
            image = Image.open(file)
            # without this, Pillow would look for EXIF behind a PNG's pixels, and read them all
            has_exif = image.format != "PNG" or "exif" in image.info
            orientation = image.getexif().get(ORIENTATION, 1) if has_exif else 1
            if image.format == "TIFF" and orientation in range(2, 9):
                image.load()
            stored, fault = image.size, unknown_range(image)
    except FileNotFoundError:
        return _Look("there is no such file")
    except Exception as error:  # Pillow raises all kinds of errors for a damaged file
        return _Look(one_line(error))
    # Pillow has turned a TIFF already
    turns = orientation in _QUARTER_TURNS and image.format != "TIFF"
    size = stored[::-1] if turns else stored
    annotated = record.get("width", size[0]), record.get("height", size[1])
    if size != annotated:
        (w, h), (w2, h2) = size, annotated
        fault = f"it has {w}×{h} px, the annotations say {w2}×{h2}"
    same_size = orientation not in _QUARTER_TURNS or size[0] == size[1]
    return _Look(fault, not fault and orientation in range(2, 9) and same_size)


def look_at_images(records: Sequence[dict], name: str, max_bad: float) -> None:
    """Open a data set's images as far as their size, and warn of what EXIF leaves in doubt.

    Single images that cannot be used are left to the loader, which meets them in their turn.

    Raises:
        NATSError: more than `max_bad` of all images cannot be used; of a large data set, more than
            half of those that were looked at.
    """
    step = len(records) // _MOST_LOOKED_AT + 1
    chosen = [record for record in records[::step] if "file_name" in record]
    with ThreadPoolExecutor(8) as pool:
        looks = list(pool.map(_look, chosen))
    looked = f"{name}: {{}} of {len(chosen)} images" + (" looked at" if step > 1 else "")
    bad = [(record, look.fault) for record, look in zip(chosen, looks) if look.fault]
    if len(bad) > (max_bad if step == 1 else 0.5) * len(chosen):
        record, fault = bad[0]
        raise NATSError(
            f"{looked.format(len(bad))} cannot be used, the first {record['file_name']}: {fault}. "
            f"Correct the image folder or the annotations, or raise RUN.MAX_BAD_DATA ({max_bad})"
        )
    turned = [record["file_name"] for record, look in zip(chosen, looks) if look.turned]
    if turned:
        logger.warning(
            f"{looked.format(len(turned))} are turned or mirrored by their EXIF, and have the "
            f"annotated size either way, the first {turned[0]}: their boxes are taken to be of the "
            "image as it is shown, not of the stored pixels"
        )
