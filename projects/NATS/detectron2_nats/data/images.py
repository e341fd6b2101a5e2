"""Look at a data set's image files before a run, in which Detectron2 reads them."""

import logging
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Dict, List, Sequence, Tuple

from PIL import Image

from ..errors import NATSError, one_line

_MOST_LOOKED_AT = 5000  # of a larger data set so many images, spread evenly
_ORIENTATION = 274  # EXIF's tag; from 5 on, width and height are exchanged

logger = logging.getLogger(__name__)


def misread(image: Image.Image) -> str:
    """Why Detectron2 would misread an opened image; "" if it would not. Loads no pixels."""
    if image.mode[0] in "IF":
        return f"its mode {image.mode} has more than 8 bits, which are cut off: convert it to 8"
    if image.format == "TIFF" and _orientation(image) > 1:
        return "EXIF turns this TIFF, which is turned twice: save it as it is shown"
    return ""


def shown_size(image: Image.Image) -> Tuple[int, int]:
    """Width and height of an opened image, turned as EXIF says. Loads no pixels."""
    return image.size[::-1] if _orientation(image) > 4 else image.size


def _orientation(image: Image.Image) -> int:
    # without this, Pillow would look for EXIF behind a PNG's pixels, and read them all
    has_exif = image.format != "PNG" or "exif" in image.info
    orientation = image.getexif().get(_ORIENTATION) if has_exif else 1
    return orientation if orientation in range(1, 9) else 1


def look_at_images(records: Sequence[dict], name: str, max_bad: float) -> None:
    """Open a data set's images as far as their size; warn of what EXIF leaves in doubt.

    Raises:
        NATSError: an image has another size than annotated, or would be misread; or more than
            `max_bad` of those that were looked at are missing or damaged.
    """
    step = len(records) // _MOST_LOOKED_AT + 1
    chosen = [record for record in records[::step] if "file_name" in record]
    seen: Dict[str, List[str]] = defaultdict(list)
    with ThreadPoolExecutor(8) as pool:
        for record, (kind, words) in zip(chosen, pool.map(_look, chosen)):
            seen[kind].append(f"{record['file_name']}: {words}")
    of_all = f"of {len(chosen)} images" + (" looked at" if step > 1 else "")
    if seen["wrong"]:
        raise NATSError(
            f"{name}: {len(seen['wrong'])} {of_all} cannot be used, the first {seen['wrong'][0]}"
        )
    if len(seen["damaged"]) > max_bad * len(chosen):
        raise NATSError(
            f"{name}: {len(seen['damaged'])} {of_all} cannot be read, the first "
            f"{seen['damaged'][0]}. Correct the image folder, or raise RUN.MAX_BAD_DATA ({max_bad})"
        )
    if seen["turned"]:
        logger.warning(f"{name}: {len(seen['turned'])} {of_all}, the first {seen['turned'][0]}")


def _look(record: dict) -> Tuple[str, str]:
    """(kind, words) of what the head of its file says."""
    from detectron2.utils.file_io import PathManager

    try:
        with PathManager.open(record["file_name"], "rb") as file:
            image = Image.open(file)
            turned, (w, h), wrong = _orientation(image) > 1, shown_size(image), misread(image)
    except FileNotFoundError:
        return "damaged", "there is no such file"
    except Image.DecompressionBombError as error:
        return "wrong", f"{error} Cut it into tiles, or raise PIL.Image.MAX_IMAGE_PIXELS"
    except Exception as error:  # Pillow raises all kinds of errors for a damaged file
        return "damaged", one_line(error)
    if wrong:
        return "wrong", wrong
    w2, h2 = record.get("width", w), record.get("height", h)
    if (w, h) != (w2, h2):
        words = f"it has {w}×{h} px, the annotations say {w2}×{h2}"
        return "wrong", f"{words}. Correct the image folder or the annotations"
    if turned and (w == h or image.size == (w, h)):
        return "turned", "EXIF turns or mirrors it: its boxes are taken to be of what is shown"
    return "", ""
