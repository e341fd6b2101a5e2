"""Annotation files as users have them: they are used as they are, or refused in a line."""

import json
import math
import random
import re

import numpy as np
import pycocotools.mask as mask_util
import pytest

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2_nats import NATSError
from detectron2_nats.data import annotations as module
from detectron2_nats.data.annotations import Needs, digest, read_annotations
from detectron2_nats.data.registry import to_records

WIDTH, HEIGHT = 40, 30


def coco(count=10, **changes):
    """`count` images of one box each, of two categories."""
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT}
            for i in range(count)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            {
                "id": 100 + i,
                "image_id": i,
                "category_id": (3, 7)[i % 2],
                "bbox": [1, 2, 10, 20],
                "area": 200,
                "iscrowd": 0,
            }
            for i in range(count)
        ],
    }
    return {**content, **changes}


@pytest.fixture
def read(tmp_path):
    def read(content, **needs):
        path = tmp_path / "annotations.json"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(json.dumps(content))
        return read_annotations(str(path), Needs(**needs))

    return read


def refused(read, content, match, **needs):
    with pytest.raises(NATSError, match=match) as caught:
        read(content, **needs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("masks", ["", "any"])
def test_reads_as_detectron2_does(read, tmp_path, masks):
    content, rng = coco(), np.random.default_rng(0)
    for i, annotation in enumerate(content["annotations"]):
        mask = np.asfortranarray(rng.random((HEIGHT, WIDTH)) < rng.random(), dtype=np.uint8)
        flat, rle = mask.ravel(order="F"), mask_util.encode(mask)
        runs = np.diff([0, *np.flatnonzero(np.diff(flat, prepend=0)), flat.size]).tolist()
        annotation["segmentation"] = [
            [[1, 2, 11, 2, 11, 22, 1, 22], [3, 4, 5, 6, 7, 8.5]],
            {**rle, "counts": rle["counts"].decode()},
            {"size": [HEIGHT, WIDTH], "counts": runs},
        ][i % 3]
    random.Random(0).shuffle(content["images"])
    annotations = read(content, masks=masks)
    name = f"nats_test_read_{masks}"
    expected = load_coco_json(str(tmp_path / "annotations.json"), "folder", name)
    meta = MetadataCatalog.get(name)
    assert annotations.class_names == meta.thing_classes == ["cat", "dog"]
    assert annotations.label_of == meta.thing_dataset_id_to_contiguous_id
    for record in expected if not masks else ():
        for annotation in record["annotations"]:
            del annotation["segmentation"]
    assert to_records(annotations, "folder") == expected
    MetadataCatalog.remove(name)


def test_a_file_is_parsed_once_until_it_changes(read, tmp_path, monkeypatch):
    parsed, parse = [], module.parse
    monkeypatch.setattr(module, "parse", lambda path: parsed.append(path) or parse(path))
    first = read(coco())
    first.content["annotations"].clear()  # a reader's own copy
    path = str(tmp_path / "annotations.json")
    assert len(read_annotations(path, Needs()).content["annotations"]) == 10 and len(parsed) == 1
    read_annotations(path, Needs(to_train=True))  # another question
    assert len(parsed) == 2
    refused(read, coco(annotations=[]), "no object to learn from", to_train=True)


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[" * 100000,
        {"images": []},
        coco(images=[{"id": 1, "file_name": 3, "width": 3, "height": 3}]),
        coco(images=[{"id": id, "file_name": f"{id}", "width": 3, "height": 3} for id in (1, "b")]),
        coco(categories=[{"id": 1, "name": "a"}, {"id": "b", "name": "b"}]),
        coco(annotations=[7]),
        coco(annotations=[{"id": 1, "image_id": [1], "category_id": 3, "bbox": [1, 2, 3, 4]}]),
    ],
)
def test_what_is_not_coco(read, content):
    refused(read, content, "annotations.json: not COCO's annotation format", to_train=True)


@pytest.mark.parametrize(
    "part, key, words",
    [
        ("images", "id", "image id 7 occurs 2 times: give each image its own"),
        ("images", "file_name", "image file_name '7.png' occurs 2 times"),
        ("annotations", "id", "annotation id 107 occurs 2 times.*merged"),
        ("categories", "id", "category id 7 occurs 2 times"),
        ("categories", "name", "category name 'dog' occurs 2 times"),
    ],
)
def test_what_occurs_twice(read, part, key, words):
    content = coco()
    content[part][0][key] = content[part][min(7, len(content[part]) - 1)][key]
    refused(read, content, words)


def test_nothing_to_learn_from(read):
    refused(read, coco(categories=[]), "its list of categories is empty")
    without = coco()
    del without["annotations"]
    crowds = coco()
    for annotation in crowds["annotations"]:
        annotation["iscrowd"] = 1
    for content in (without, coco(annotations=[]), crowds):
        more = r", only 10 crowds \(iscrowd 1\)" if content is crowds else "$"
        refused(read, content, f"contains no object to learn from{more}", to_train=True)
        assert read(content).content.get("annotations") == content.get("annotations")  # to test on


FAULTS = [
    ({"bbox": [1, 2, 0, 20]}, r"box has no size: \[1, 2, 0, 20\]"),
    ({"bbox": [1, 2, 10]}, r"bbox is not \[x, y, width, height\]: \[1, 2, 10\]"),
    ({"bbox": [1, 2, 10, math.nan]}, "bbox is not"),
    ({"bbox": None}, "bbox is not .*: None"),
    ({"bbox": [31, 2, 10, 20]}, None),  # by one pixel
    ({"bbox": [31.1, 2, 10, 20]}, r"box leaves its image .*\(\[31.1, 2, 10, 20\], \[40, 30\]\)"),
    ({"bbox": [1, -1.1, 10, 20]}, "box leaves its image"),
    ({"bbox": [0.1, 0.2, 0.5, 0.5]}, "smaller than a pixel, in the corner of its image"),
    ({"category_id": 4}, "category_id is not listed: 4"),
    ({"image_id": 99}, "image_id is not listed: 99"),
    ({"iscrowd": None}, "iscrowd is not 0 or 1: None"),
    ({"iscrowd": 1}, None),
    ({"ignore": 1}, "ignore is not known to Detectron2: 1"),
    ({"ignore": 0}, None),
    ({"area": 0}, "area is not a number above 0: 0"),
    ({"id": 0}, "id is not a whole number from 1: 0"),
    ({"id": "n4"}, "id is not a whole number from 1: 'n4'"),
]


@pytest.mark.parametrize("change, reason", FAULTS)
def test_an_annotation_that_cannot_be_used_as_it_is(read, change, reason):
    content = coco()
    content["annotations"][4].update(change)
    if reason is None:
        assert read(content).content == content
        return
    content["annotations"][5]["bbox"] = [1, 2, 3]
    where = "no image" if "image_id" in change else "4.png"
    id = change.get("id", 104)
    count = 1 + reason.startswith("bbox is not")
    match = f"annotations.json: {where}, annotation id {id!r}: .*{reason}.*"
    refused(
        read, content, rf"{match}\({count} such, 2 faults in all\)\. Write a clean file: python"
    )


def test_the_command_that_writes_a_clean_file(read, tmp_path):
    command = f"python tools/clean_coco.py {tmp_path}/annotations.json {tmp_path}/annotations_clean"
    content = coco()
    content["annotations"][4]["bbox"] = [1, 2, 0, 20]
    refused(read, content, f"{command}.json$")
    refused(read, content, f"{command}.json --masks$", masks="any")
    content["images"][4]["width"] = -1
    refused(
        read, content, rf"4.png: width.*\(-1, 30\) \(1 such, 1 faults.*{command}.json --images F"
    )


@pytest.mark.parametrize("width", [0, "40", None, True, math.nan])
def test_an_image_without_a_size(read, width):
    content = coco()
    content["images"][4]["width"] = width
    refused(
        read, content, r"4.png: width, height are not whole numbers of pixels: .* --images FOLD"
    )


# -- masks -----------------------------------------------------------------------------------------

RLE = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
NO_RLE = "segmentation is no RLE of its image's size"
NO_POLYGONS = "segmentation is not a list of polygons"


@pytest.mark.parametrize(
    "mask, reason",
    [
        ([[1, 2, 11, 2, 11, 22]], ""),
        ([[1, 2, 11, 2, 11, 22], [1, 2]], NO_POLYGONS),  # Detectron2 drops the second
        (None, "segmentation is missing, and MODEL.MASK_ON is True"),
        ([[1, 2, 3, 4]], NO_POLYGONS),
        ([["1", 2, 11, 2, 11, 22]], NO_POLYGONS),
        ([[1, 52, 11, 52, 11, 72]], "segmentation lies outside its box"),
        (RLE, ""),
        ({**RLE, "size": [3, 4]}, NO_RLE),
        ({**RLE, "counts": [3]}, NO_RLE),
        ({**RLE, "counts": "zzz~~~!!"}, NO_RLE),
        ({**RLE, "counts": "0P"}, NO_RLE),  # ends in the middle of a number
    ],
)
def test_masks(read, mask, reason):
    content = coco()
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[1, 2, 11, 2, 11, 22]]
    content["annotations"][4]["segmentation"] = mask
    kept = read(content).content["annotations"]
    assert len(kept) == 10 and not any("segmentation" in a for a in kept)  # not looked at
    if reason:
        refused(read, content, f"4.png, .*{re.escape(reason)}.* --masks$", masks="any")
    else:
        assert read(content, masks="any").content == content
    if isinstance(mask, dict):
        reason = r"is an RLE, and INPUT.MASK_FORMAT polygon: .*Set INPUT.MASK_FORMAT bitmask$"
        refused(read, content, reason, masks="polygon")
        content["annotations"][4]["iscrowd"] = 1  # which no mask head is trained on
        if mask is RLE:
            read(content, masks="polygon")


def test_the_digest_tells_data_apart(read):
    first = to_records(read(coco()), "folder")
    assert digest(first) == digest(to_records(read(coco()), "elsewhere"))
    for place, change in enumerate([{"bbox": [1, 2, 10, 19]}, {"category_id": 7}, {"iscrowd": 1}]):
        content = coco()
        content["annotations"][place * 2].update(change)
        assert digest(to_records(read(content), "folder")) != digest(first)
    assert digest(first[1:]) != digest(first)
