"""Images as users have them: 16 bits, EXIF, and what is looked at before a run."""

import logging

import numpy as np
import pytest
from PIL import Image

from detectron2.data import detection_utils
from detectron2_nats import NATSError
from detectron2_nats.config import load_config
from detectron2_nats.data import images
from detectron2_nats.data.images import ImageMapper, look_at_images, read_image, readable

GRAY = np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8)


def save(path, pixels, orientation=None, **options):
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    if orientation:
        exif[274] = orientation
    image.save(path, exif=exif, **options)
    return str(path)


def record(path, width=40, height=30):
    return {"file_name": str(path), "width": width, "height": height, "image_id": 1}


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detectron2_nats"), "parent", logging.getLogger())
    return lambda: [r.getMessage() for r in caplog.records]


@pytest.mark.parametrize("format", ["BGR", "RGB", "L"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_are_read_like_the_same_image_of_8(tmp_path, name, orientation, format):
    wide = save(tmp_path / f"wide_{name}", GRAY.astype(np.uint16) * 257, orientation)
    narrow = save(tmp_path / name, GRAY, orientation)
    as_png = save(tmp_path / "expected.png", GRAY, orientation)
    expected = detection_utils.read_image(as_png, format)
    for path in (wide, narrow):
        assert np.array_equal(read_image(path, format), expected)
        look_at_images([record(path, *expected.shape[1::-1])], "mine", 0.01)


def test_big_endian(tmp_path):
    pixels = GRAY.astype(">u2") * 257
    Image.frombytes("I;16B", (40, 30), pixels.tobytes()).save(tmp_path / "a.tif")
    assert np.array_equal(read_image(str(tmp_path / "a.tif"), "L")[:, :, 0], GRAY)


def test_an_unknown_range_is_refused(tmp_path):
    path = save(tmp_path / "a.tif", GRAY.astype(np.float32))
    with pytest.raises(ValueError, match="mode F does not tell what is white"):
        read_image(path, "RGB")
    with pytest.raises(NATSError, match="1 of 1 images cannot be used, .*a.tif: its mode F"):
        look_at_images([record(path)], "mine", 0.01)
    save(tmp_path / "b.tif", GRAY.astype(np.int32))
    with pytest.raises(ValueError, match="mode I does not tell"):
        read_image(str(tmp_path / "b.tif"), "RGB")


def test_the_mapper_reads_them(tmp_path):
    cfg = load_config("", ["INPUT.MIN_SIZE_TEST", "30"])
    original = detection_utils.read_image
    path = save(tmp_path / "a.png", GRAY.astype(np.uint16) * 257)
    image = ImageMapper(cfg, is_train=False)(record(path))["image"]
    assert np.array_equal(image[0].numpy(), GRAY)
    assert detection_utils.read_image is original


# -- before a run ---------------------------------------------------------------------------------


def test_a_wrong_folder_and_wrong_sizes(tmp_path):
    path = save(tmp_path / "a.png", GRAY)
    with pytest.raises(NATSError, match="mine: 1 of 1 images .*b.png: there is no such file"):
        look_at_images([record(tmp_path / "b.png")], "mine", 0.01)
    with pytest.raises(NATSError, match="it has 40×30 px, the annotations say 30×40. Correct"):
        look_at_images([record(path, 30, 40)], "mine", 0.01)
    (tmp_path / "c.png").write_bytes(b"no image")
    with pytest.raises(NATSError, match="c.png: UnidentifiedImageError"):
        look_at_images([record(tmp_path / "c.png")], "mine", 0.01)
    look_at_images([record(path)] * 3 + [record(tmp_path / "c.png")], "mine", 0.25)


def test_of_many_images_some_are_looked_at(tmp_path, monkeypatch, warnings):
    monkeypatch.setattr(images, "_MOST_LOOKED_AT", 10)
    path = save(tmp_path / "a.png", GRAY)
    missing = record(tmp_path / "b.png")
    look_at_images([record(path)] * 20 + [missing] * 19, "mine", 0.01)  # the loader counts
    with pytest.raises(NATSError, match="mine: 6 of 10 images looked at cannot be used"):
        look_at_images([record(path)] * 16 + [missing] * 23, "mine", 0.01)


@pytest.mark.parametrize(
    "orientation, width, height, doubtful",
    [(1, 40, 30, False), (3, 40, 30, True), (2, 40, 30, True), (6, 30, 40, False)],
)
def test_what_exif_leaves_in_doubt(tmp_path, warnings, orientation, width, height, doubtful):
    path = save(tmp_path / "a.jpg", GRAY, orientation)
    look_at_images([record(path, width, height)], "mine", 0.01)
    assert bool(warnings()) == doubtful
    if doubtful:
        assert "mine: 1 of 1 images are turned or mirrored by their EXIF" in warnings()[0]
    square = save(tmp_path / "b.jpg", GRAY[:, :30], 6)
    look_at_images([record(square, 30, 30)], "mine", 0.01)
    assert "b.jpg" in warnings()[-1]


def test_readable(tmp_path, warnings):
    good = record(save(tmp_path / "a.png", GRAY))
    bad = record(tmp_path / "b.png")
    assert readable([bad, good]) == [good]
    assert f"skipping image {tmp_path}/b.png" in warnings()[0]
    with pytest.raises(NATSError, match="no image can be read, the first .*b.png"):
        readable([bad])
