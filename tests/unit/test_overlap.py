"""Images that stand in two splits, under one name or two."""

import logging
import shutil

import pytest

from detectron2.data import DatasetCatalog
from detectron2_nats import NATSError
from detectron2_nats.data import overlap
from detectron2_nats.data.overlap import check_disjoint, shared_images, warn_of_test_images


@pytest.fixture
def messages(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detectron2_nats"), "parent", logging.getLogger())
    return caplog


def write(folder, **contents):
    """Files of a folder by name, made of what is given."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.jpg").write_bytes(content)
    return [str(folder / f"{name}.jpg") for name in contents]


def test_by_path_also_through_links(tmp_path):
    train = [str(tmp_path / f"{i}.png") for i in range(5)]
    other = [str(tmp_path / f"{i}.png") for i in range(5, 9)]
    check_disjoint(train, other)
    link = tmp_path / "link.png"  # the same image under another name
    link.symlink_to(tmp_path / "3.png")
    with pytest.raises(NATSError) as caught:
        check_disjoint(train, [*other, str(link), train[1]])
    assert str(caught.value) == (
        f"DATASETS.TRAIN and DATASETS.CALIBRATION share 2 images: {link} ({train[3]}), {train[1]}. "
        "α must be trained on images that the weights are not trained on. Leave them out of one of "
        "the two"
    )


def test_of_many_shared_images_ten_stand_in_the_error_and_all_in_the_log(tmp_path, messages):
    copies = {f"image{i:02d}": bytes([i]) for i in range(11)}
    train, other = write(tmp_path / "a", **copies), write(tmp_path / "b", **copies)
    with pytest.raises(NATSError, match=r"share 11 .*, … \(the log names all\)\. α") as caught:
        check_disjoint(train, other)
    assert "\n" not in str(caught.value) and str(caught.value).count(" (/") == 10
    (record,) = messages.records
    pairs = [f"{copy} ({image})" for copy, image in zip(other, train)]
    assert record.getMessage().splitlines()[1:] == pairs


@pytest.mark.parametrize("few", [0, 5000])
def test_by_cocos_number(few, monkeypatch):
    """A zoo config's TRAIN with the default CALIBRATION; nothing is there to be read."""
    monkeypatch.setattr(overlap, "_FEW", few)
    train2017 = [f"coco/train2017/{i:012d}.jpg" for i in (9, 25, 42)]
    train2014 = [f"coco/train2014/COCO_train2014_{i:012d}.jpg" for i in (9, 25)]
    val2014 = [f"coco/val2014/COCO_val2014_{i:012d}.jpg" for i in (42, 73)]
    assert shared_images(train2017, val2014) == {val2014[0]: train2017[2]}
    assert shared_images(val2014, train2017) == {train2017[2]: val2014[0]}
    assert shared_images(train2014, ["elsewhere/COCO_val2014_000000000025.jpg"])
    check_disjoint(train2014, val2014)
    check_disjoint(train2014, [f"coco/val2017/{i:012d}.jpg" for i in (1, 2)])
    with pytest.raises(NATSError) as caught:
        check_disjoint(train2017, val2014)
    assert str(caught.value) == (
        "DATASETS.TRAIN and DATASETS.CALIBRATION share 1 images: "
        f"{val2014[0]} ({train2017[2]}). α must be trained on images that the weights are not "
        "trained on. coco_2017_train, which the zoo's configs train on, contains "
        "coco_2014_valminusminival: set DATASETS.TRAIN \"('coco_2014_train',)\""
    )


@pytest.mark.parametrize("few", [0, 5000])
def test_equal_names_of_other_data_are_compared_by_content(tmp_path, monkeypatch, few):
    """Also such as look like COCO's."""
    monkeypatch.setattr(overlap, "_FEW", few)
    names = ["0001", "0002", "000000000042", "empty"]
    train = write(tmp_path / "a", **{name: name.encode() for name in names[:3]}, empty=b"")
    same_size = {name: name[::-1].encode() for name in names[:3]}
    other = write(tmp_path / "b", **same_size, **{"0003": b"new"}, empty=b"")
    assert shared_images(train, [*other, str(tmp_path / "missing.jpg")]) == {}
    shutil.copy(train[1], other[1])
    shutil.copy(train[2], other[2])
    assert shared_images(train, other) == {other[1]: train[1], other[2]: train[2]}


def test_renamed_copies_are_found_where_the_files_are_few(tmp_path):
    train = write(tmp_path / "a", one=b"111", two=b"222")
    other = write(tmp_path / "b", three=b"333", copy=b"222")
    assert shared_images(train, other) == {other[1]: train[1]}


def test_test_images_among_the_others_are_warned_of(tmp_path, messages):
    train = write(tmp_path / "a", one=b"111", two=b"222")
    test = write(tmp_path / "b", two=b"222", three=b"333")
    DatasetCatalog.register("nats_test_overlap", lambda: [{"file_name": file} for file in test])
    try:
        warn_of_test_images(["nats_test_overlap"], train[:1], "DATASETS.TRAIN")
        assert not messages.records
        warn_of_test_images(["nats_test_overlap"], train, "DATASETS.TRAIN")
    finally:
        DatasetCatalog.remove("nats_test_overlap")
    (record,) = messages.records
    expected = f"DATASETS.TEST and DATASETS.TRAIN share 1 images: {test[0]} ({train[1]}). "
    assert record.getMessage().startswith(expected)
