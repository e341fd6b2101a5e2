"""What is seen of image files before a run: sizes, 16 bits, EXIF."""

import logging

import numpy as np
import pytest
from PIL import Image

from detectron2.data import detection_utils
from detectron2_nats import NATSError
from detectron2_nats.data import images
from detectron2_nats.data.images import look_at_images

GRAY = np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8)


def save(path, pixels, orientation=None):
    exif = Image.Exif()
    if orientation:
        exif[274] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return str(path)


def record(path, width=40, height=30):
    return {"file_name": str(path), "width": width, "height": height, "image_id": 1}


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detectron2_nats"), "parent", logging.getLogger())
    return lambda: [r.getMessage() for r in caplog.records]


@pytest.mark.parametrize("orientation", [None, 3, 6])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_what_passes_is_read_rightly(tmp_path, name, orientation):
    """Pillow turns a TIFF when it loads it, and Detectron2 once more."""
    path = save(tmp_path / name, GRAY, orientation)
    with Image.open(save(tmp_path / "right.png", GRAY, orientation)) as image:
        right = np.asarray(detection_utils._apply_exif_orientation(image))
    if name == "a.tif" and orientation not in (None, 1):
        with pytest.raises(NATSError, match="a.tif: EXIF turns this TIFF, which is turned twice"):
            look_at_images([record(path, *right.shape[::-1])], "mine", 0.5)
        return
    look_at_images([record(path, *right.shape[::-1])], "mine", 0)
    read = detection_utils.read_image(path, "L")[:, :, 0]
    assert np.allclose(read, right, atol=60 if name == "a.jpg" else 0)


@pytest.mark.parametrize(
    "name, pixels, mode",
    [
        ("a.png", GRAY.astype(np.uint16) * 257, "I"),
        ("a.tif", GRAY.astype(np.uint16) * 257, "I;16"),
        ("a.tif", GRAY.astype(np.float32), "F"),
    ],
)
def test_more_than_8_bits_are_refused(tmp_path, name, pixels, mode):
    good = record(save(tmp_path / "good.png", GRAY))
    path = save(tmp_path / name, pixels)
    words = f"mine: 1 of 3 images .*{name}: its mode {mode}.* has more than 8 bits.*convert it to 8"
    with pytest.raises(NATSError, match=words):
        look_at_images([good, record(path), good], "mine", 0.5)


def test_wrong_folders_sizes_and_files(tmp_path):
    good, missing = record(save(tmp_path / "a.png", GRAY)), record(tmp_path / "b.png")
    with pytest.raises(NATSError, match=r"mine: 1 of 1 .*b.png: there is no such file.*BAD_DATA"):
        look_at_images([missing], "mine", 0.01)
    with pytest.raises(
        NATSError, match="1 of 2 .* it has 40×30 px, the annotations say 30×40. Cor"
    ):
        look_at_images([good, record(tmp_path / "a.png", 30, 40)], "mine", 0.5)
    (tmp_path / "c.png").write_bytes(b"no image")
    damaged = record(tmp_path / "c.png")
    with pytest.raises(NATSError, match=r"c.png: UnidentifiedImageError.*RUN.MAX_BAD_DATA \(0.2\)"):
        look_at_images([good] * 3 + [damaged], "mine", 0.2)
    look_at_images([good] * 3 + [damaged], "mine", 0.25)  # the loader replaces it


def test_of_many_images_some_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_MOST_LOOKED_AT", 10)
    good, missing = record(save(tmp_path / "a.png", GRAY)), record(tmp_path / "b.png")
    look_at_images([good] * 20 + [missing] * 19, "mine", 0.5)
    with pytest.raises(NATSError, match="mine: 6 of 10 images looked at cannot be read"):
        look_at_images([good] * 16 + [missing] * 23, "mine", 0.5)


@pytest.mark.parametrize(
    "orientation, width, height, doubtful",
    [(1, 40, 30, False), (3, 40, 30, True), (2, 40, 30, True), (6, 30, 40, False)],
)
def test_what_exif_leaves_in_doubt(tmp_path, warnings, orientation, width, height, doubtful):
    path = save(tmp_path / "a.jpg", GRAY, orientation)
    look_at_images([record(path, width, height)], "mine", 0.01)
    assert bool(warnings()) == doubtful
    square = save(tmp_path / "b.jpg", GRAY[:, :30], 6)
    look_at_images([record(square, 30, 30)], "mine", 0.01)
    assert "mine: 1 of 1 images, the first" in warnings()[-1] and "b.jpg: EXIF" in warnings()[-1]


def test_an_image_above_pillows_limit_is_told_its_cure(tmp_path, monkeypatch):
    path = save(tmp_path / "large.png", GRAY)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(NATSError, match="large.png: .*exceeds limit.*Cut it into tiles"):
        look_at_images([record(path)], "mine", 1)
