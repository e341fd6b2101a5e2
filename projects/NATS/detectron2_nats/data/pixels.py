"""What the values of an image file mean; needs no Detectron2."""

import numpy as np
from PIL import Image

ORIENTATION = 274
"""EXIF's tag."""


def eight_bits(image: Image.Image) -> Image.Image:
    """An opened image; of 16 bits, their whole range becomes that of 8. EXIF's orientation stays.

    A TIFF is loaded, in which Pillow turns it as its EXIF says: nobody must turn it again.

    Raises:
        ValueError: the range of its values is unknown.
    """
    fault = unknown_range(image)
    if fault:
        raise ValueError(fault)
    if image.format == "TIFF":
        image.load()
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image).astype(np.float32) / 257
    scaled = Image.fromarray(pixels.round().astype(np.uint8))
    scaled.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
    return scaled


def unknown_range(image: Image.Image) -> str:
    """Why nothing says what is white (32 bits, floating point); else nothing. Loads no pixels."""
    # Older versions of Pillow open PNGs of 16 bits in mode I, which says 32
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        return f"its mode {image.mode} does not tell what is white: convert it to 8 or 16 bits"
    return ""
