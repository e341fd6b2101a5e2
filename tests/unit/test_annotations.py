"""Annotation files as users have them: what is refused, left out and filled in."""

import contextlib
import copy
import io
import json
import logging
import math
import random
import re

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_strangers_files import many

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2_nats import NATSError
from detectron2_nats.data import annotations as module
from detectron2_nats.data.annotations import Needs, digest, read_annotations, to_records

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
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(module, "_warned", set())
    monkeypatch.setattr(logging.getLogger("detectron2_nats"), "parent", logging.getLogger())
    return lambda: [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


@pytest.fixture
def read(tmp_path):
    def read(content, **needs):
        path = tmp_path / "annotations.json"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(json.dumps(content))
        return read_annotations(str(path), Needs(**{"max_bad": 0.2, **needs}))

    return read


def refused(read, content, match, **needs):
    with pytest.raises(NATSError, match=match) as caught:
        read(content, **needs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("masks", ["", "any"])
def test_reads_as_detectron2_does(read, tmp_path, masks):
    content = coco()
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[2:22, 1:11] = 1
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    encoded = {**mask_util.encode(mask)}
    encoded["counts"] = encoded["counts"].decode()
    for i, annotation in enumerate(content["annotations"]):
        annotation["segmentation"] = [
            [[1, 2, 11, 2, 11, 22, 1, 22], [3, 4, 5, 6, 7, 8.5]],
            encoded,
            {"size": [HEIGHT, WIDTH], "counts": counts},
        ][i % 3]
    random.Random(0).shuffle(content["images"])
    found = read(content, masks=masks)
    assert not found.changed
    name = f"nats_test_read_{masks}"
    expected = load_coco_json(str(tmp_path / "annotations.json"), "folder", name)
    meta = MetadataCatalog.get(name)
    assert found.class_names == meta.thing_classes == ["cat", "dog"]
    assert found.label_of == meta.thing_dataset_id_to_contiguous_id
    if not masks:
        for record in expected:
            for annotation in record["annotations"]:
                del annotation["segmentation"]
    assert to_records(found, "folder") == expected
    MetadataCatalog.remove(name)


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[" * 100000,
        b"\x89PNG\xff",
        b"null",
        [],
        "text",
        {"images": []},
        coco(images=[{"id": 1}]),
        coco(images=7),
        coco(images=[3]),
        coco(images=[{"id": 1, "file_name": 3, "width": 3, "height": 3}]),
        coco(categories=[{}]),
        coco(categories=[{"id": []}]),
        coco(categories=[{"id": 1, "name": "a"}, {"id": "b", "name": "b"}]),
        coco(categories=[{"id": 1, "name": 3}]),
        coco(annotations=[7]),
        coco(annotations=5),
        coco(annotations={"a": 1}),
        coco(annotations=[{"id": 1, "image_id": [1], "category_id": 3, "bbox": [1, 2, 3, 4]}]),
    ],
)
def test_what_is_not_coco(read, content):
    refused(read, content, "annotations.json: not COCO's annotation format", to_train=True)


def test_ids_that_occur_twice(read):
    content = coco()
    content["images"][4]["id"] = 7
    refused(read, content, r"image id 7 occurs twice, for 4.png and 7.png: give each image an id")
    content = coco()
    content["annotations"][4]["id"] = 107
    refused(read, content, r"annotation id 107 occurs twice, for 4.png and 7.png")
    content = coco(categories=[{"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}])
    refused(read, content, "category id 3 occurs twice, for 'cat' and 'dog'")


def test_nothing_to_learn_from(read):
    refused(read, coco(categories=[]), "its list of categories is empty")
    without = coco()
    del without["annotations"]
    refused(read, without, "contains no annotations, which training needs", to_train=True)
    refused(read, coco(annotations=[]), "contains no object to learn from", to_train=True)
    crowds = coco()
    for annotation in crowds["annotations"]:
        annotation["iscrowd"] = 1
    refused(read, crowds, r"no object to learn from, only 10 crowds \(iscrowd 1\)", to_train=True)
    for content in (without, coco(annotations=[]), crowds):  # to test on, they will do
        assert not read(content).changed
    assert "annotations" not in read(without).content


# -- left out --------------------------------------------------------------------------------------

BAD = [
    ({"bbox": [1, 2, 0, 20]}, r"box \[1, 2, 0, 20\] has no size"),
    ({"bbox": [1, 2, 10, -1]}, "has no size"),
    ({"bbox": [1, 2, 10]}, r"bbox \[1, 2, 10\] is not \[x, y, width, height\]"),
    ({"bbox": [1, 2, 10, math.nan]}, r"is not \[x, y, width, height\]"),
    ({"bbox": [1, 2, 10, math.inf]}, r"is not \[x, y, width, height\]"),
    ({"bbox": ["1", "2", "10", "20"]}, r"is not \[x, y, width, height\]"),
    ({"bbox": None}, "bbox None is not"),
    ({"bbox": [31, 2, 10, 20]}, None),  # by one pixel
    ({"bbox": [31.1, 2, 10, 20]}, r"box \[31.1, 2, 10, 20\] leaves its image of 40×30 px"),
    ({"bbox": [1, -1.1, 10, 20]}, "leaves its image"),
    ({"bbox": [400, 2, 10, 20]}, "leaves its image"),
    ({"bbox": [0.1, 0.2, 0.5, 0.5]}, "smaller than a pixel, in the corner of its image"),
    ({"category_id": 4}, "category 4 is not in the list of categories"),
    ({"category_id": "3"}, "category '3' is not in the list of categories"),
    ({"image_id": 99}, "image id 99 is not listed"),
    ({"image_id": "4"}, "image id '4' is not listed"),
    ({"iscrowd": "0"}, "iscrowd '0' is not 0 or 1"),
    ({"ignore": 1}, "it says ignore"),
    ({"ignore": 0}, None),
]


@pytest.mark.parametrize("change, reason", BAD)
def test_a_bad_annotation_is_left_out_with_one_warning(read, warnings, change, reason):
    content = coco()
    for i in (4, 5):
        content["annotations"][i].update(change)
    found = read(content)
    read(content)  # as an evaluator does
    left = 10 if reason is None else 8
    assert len(found.content["annotations"]) == left and found.changed == (left == 8)
    assert len(to_records(found, "")) == 10
    if reason is None:
        assert not warnings()
        return
    (line,) = warnings()
    where = "no listed image" if "image_id" in change else "4.png"
    assert (
        f"annotations.json: 2 of 10 annotations cannot be used, the first (id 104, {where})" in line
    )
    assert re.search(reason, line)
    content["annotations"][6].update(change)
    refused(read, content, f"3 of 10 annotations .*{reason}.*RUN.MAX_BAD_DATA")


@pytest.mark.parametrize("width", [-1, 0, "40", None, 40.5, True, math.nan])
def test_an_image_without_a_size(read, warnings, width):
    content = coco()
    content["images"][4]["width"] = width
    found = read(content)
    assert len(found.content["images"]) == len(found.content["annotations"]) == 9
    (line,) = warnings()
    assert "1 of 10 images cannot be used, the first 4.png: width" in line
    del content["images"][5]["width"], content["images"][6]["height"]
    refused(read, content, "3 of 10 images .*Write the images' sizes in pixels")


def cornered(box):
    x, y, w, h = box
    return [x, y, x + w, y + h]


@pytest.mark.parametrize(
    "change, cause",
    [
        (cornered, "It looks like x1 y1 x2 y2: write x y width height"),
        (lambda b: [b[0] / 40, b[1] / 30, b[2] / 40, b[3] / 30], "shares of the image"),
        (lambda b: [b[0] + b[2] / 2, b[1] + b[3] / 2, *b[2:]], "the box's centre"),
        (lambda b: [5 * v for v in b], "Repair the file"),
    ],
)
def test_the_likely_cause_of_many_bad_boxes(read, change, cause):
    content = coco()
    for annotation in content["annotations"]:
        annotation["bbox"] = change([25, 12, 14, 17])
    refused(read, content, rf"10 of 10 annotations .*{re.escape(cause)}.*, or raise RUN.MAX_BAD")


def test_files_listed_twice(read, warnings):
    content = coco()
    content["images"][4]["file_name"] = "7.png"
    assert not read(content).changed
    assert (
        "1 image files are listed more than once, under other ids, the first 7.png" in warnings()[0]
    )


# -- masks -----------------------------------------------------------------------------------------

RLE = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}


@pytest.mark.parametrize(
    "mask, any_reason, polygon_reason",
    [
        ([[1, 2, 11, 2, 11, 22]], "", ""),
        ([[1, 2, 11, 2, 11, 22], [1, 2]], "", ""),  # Detectron2 drops the second
        (None, "it has no segmentation, and MODEL.MASK_ON is True", None),
        ([], "it has no segmentation", None),
        ([1, 2, 10, 20], r"segmentation \[1, 2, 10, 20\] is not a list of polygons", None),
        ([[1, 2, 3, 4]], "is not a list of polygons", None),
        ([[[1, 2], [3, 4], [5, 6]]], "is not a list of polygons", None),
        ([["1", 2, 11, 2, 11, 22]], "is not a list of polygons", None),
        ("text", "is not a list of polygons", None),
        ([[0.1, 0.2, 0.5, 0.2, 0.5, 0.9]], r"lies outside its box \[1, 2, 10, 20\]", None),
        ([[1, 52, 11, 52, 11, 72]], "lies outside its box", None),
        (RLE, "", "its segmentation is an RLE: set INPUT.MASK_FORMAT bitmask"),
        ({**RLE, "size": [3, 4]}, r"its mask has size \[3, 4\]", ""),
        ({**RLE, "counts": [3]}, "its RLE does not fill its size", ""),
        ({**RLE, "counts": None}, "its RLE has counts None", ""),
        ({**RLE, "counts": "zzz~~~!!"}, "its RLE has counts", ""),
        ({**RLE, "counts": "é中"}, "its RLE has counts", ""),
        ({**RLE, "counts": "0P"}, "its RLE has counts '0P'", ""),  # ends in the middle of a number
        ({**RLE, "counts": "5"}, "its RLE does not fill its size", ""),
    ],
)
def test_masks(read, warnings, mask, any_reason, polygon_reason):
    content = coco()
    content["annotations"][4].update(segmentation=mask)
    kept = read(content).content["annotations"]
    assert len(kept) == 10 and not any("segmentation" in a for a in kept)  # not looked at
    for annotation in content["annotations"]:
        annotation.setdefault("segmentation", [[1, 2, 11, 2, 11, 22]])
    for masks, reason in (("any", any_reason), ("polygon", polygon_reason)):
        reason = any_reason if reason is None else reason
        kept = read(content, masks=masks).content["annotations"]
        assert len(kept) == (9 if reason or (masks == "polygon" and isinstance(mask, dict)) else 10)
        if reason:
            assert re.search(reason, warnings()[-1])
    if isinstance(mask, list) and len(mask) == 2:
        assert read(content, masks="any").content["annotations"][4]["segmentation"] == mask[:1]


@pytest.mark.parametrize("seed", range(20))
def test_compressed_counts_are_read_as_pycocotools_does(seed):
    rng = np.random.default_rng(seed)
    mask = np.asfortranarray(rng.random(rng.integers(1, 40, 2)) < rng.random(), dtype=np.uint8)
    runs = module._runs(mask_util.encode(mask)["counts"].decode())
    values = np.concatenate([np.full(run, i % 2) for i, run in enumerate(runs)])
    assert np.array_equal(values.reshape(mask.shape, order="F"), mask)


# -- filled in -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids", [range(10), "abcdefghij", [None] * 10, range(-3, 7), [0.5, 1, 2, 3]]
)
def test_annotation_ids_become_numbers_from_one(read, ids):
    content = coco()
    for annotation, id in zip(content["annotations"], ids):
        annotation["id"] = id
    found = read(content)
    assert found.changed and [a["id"] for a in found.content["annotations"]] == [*range(1, 11)]


def test_what_only_the_evaluator_needs_is_filled_in(read):
    content = coco()
    for annotation, area in zip(content["annotations"], [None, -1, 0, "200", math.nan]):
        annotation["area"] = area
        del annotation["iscrowd"]
    del content["annotations"][5]["area"]
    found = read(content)
    assert found.changed
    assert [(a["area"], a["iscrowd"]) for a in found.content["annotations"]] == [(200, 0)] * 10


# -- damaged in random ways ------------------------------------------------------------------------


def scene(seed):
    """A good file, and a detector's detections on it: (image id, class name, box, score)."""
    rng = np.random.default_rng(seed)
    content, detections = coco(8, annotations=[]), []
    for image in content["images"]:
        for _ in range(rng.integers(1, 4)):
            w, h = rng.integers(4, 20, 2).tolist()
            x, y = int(rng.integers(0, WIDTH - w)), int(rng.integers(0, HEIGHT - h))
            category = content["categories"][rng.integers(2)]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": category["id"],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
            box = (np.array([x, y, w, h]) + rng.uniform(-1, 1, 4)).tolist()
            if rng.random() < 0.9:
                detections.append((image["id"], category["name"], box, float(rng.random())))
    return content, detections


def numbers(content, detections):
    """The twelve numbers of COCO's evaluation, and how often each class occurs."""
    by_name = {category["name"]: category["id"] for category in content["categories"]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        images = {image["id"] for image in content["images"]}
        found = [
            {"image_id": image, "category_id": by_name[name], "bbox": box, "score": score}
            for image, name, box, score in detections
            if image in images
        ]
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def _each(content, draw, change):
    for annotation in content["annotations"]:
        if draw(st.booleans()):
            change(annotation)


def _some(content, draw):
    """Up to a fifth of the annotations."""
    annotations = content["annotations"]
    count = draw(st.integers(1, max(1, len(annotations) // 5)))
    return draw(st.permutations(annotations))[:count]


@st.composite
def damages(draw, content):
    """(damaged content, repaired content or None where only a refusal will do)."""
    damaged, repaired = copy.deepcopy(content), copy.deepcopy(content)
    drawn = draw(st.lists(st.sampled_from(HOW), min_size=1, max_size=3, unique=True))
    for how in sorted(drawn, key=HOW.index):
        outcome = how(damaged, draw)
        if outcome is None:
            repaired = None
        elif repaired is not None:
            gone, images = outcome
            boxes = [(a["image_id"], str(a["bbox"])) for a in gone]
            repaired["images"] = [i for i in repaired["images"] if i["id"] not in images]
            repaired["annotations"] = [
                a
                for a in repaired["annotations"]
                if (a["image_id"], str(a["bbox"])) not in boxes and a["image_id"] not in images
            ]
    return damaged, repaired


def ids_from_zero(content, draw):
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = number
    return [], ()


def ids_of_words(content, draw):
    for annotation in content["annotations"]:
        annotation["id"] = f"n{annotation['id']}"
    return [], ()


def no_ids(content, draw):
    _each(content, draw, lambda a: a.pop("id", None))
    return [], ()


def no_area(content, draw):
    value = draw(st.sampled_from([None, 0, -1, "big"]))
    _each(content, draw, lambda a: a.update(area=value))
    return [], ()


def no_iscrowd(content, draw):
    _each(content, draw, lambda a: a.pop("iscrowd", None))
    return [], ()


def odd_masks(content, draw):
    value = draw(st.sampled_from([[1, 2, 3, 4], "x", None, [[1]], {"size": 3}]))
    _each(content, draw, lambda a: a.update(segmentation=value))
    return [], ()


def shuffled(content, draw):
    for part in content.values():
        draw(st.randoms(use_true_random=False)).shuffle(part)
    return [], ()


def bad_boxes(content, draw):
    chosen = [a for a in _some(content, draw)]
    gone = copy.deepcopy(chosen)
    for annotation in chosen:
        x, y, w, h = annotation["bbox"] if len(annotation["bbox"] or ()) == 4 else [0, 0, 9, 9]
        annotation["bbox"] = draw(
            st.sampled_from([[x, y, w], [x, y, 0, h], [x + 90, y, w, h], None, [x, y, "4", h]])
        )
    return gone, ()


def bad_size(content, draw):
    image = draw(st.sampled_from(content["images"]))
    image["height"] = draw(st.sampled_from([-1, None, "30"]))
    return [], (image["id"],)


def repeated_image(content, draw):
    content["images"].append({**content["images"][0], "file_name": "other.png"})


def repeated_annotation(content, draw):
    content["annotations"].append({**content["annotations"][0], "id": 1})
    content["annotations"].append({**content["annotations"][0], "id": 1})


def shares(content, draw):
    for annotation in content["annotations"]:
        annotation["bbox"] = [0.1, 0.2, 0.3, 0.4]


# in the order in which they are done: what is refused at the end, so that nothing hides it
HOW = [bad_boxes, bad_size, no_area, no_iscrowd, odd_masks, ids_from_zero, ids_of_words, no_ids]
HOW += [shuffled, repeated_image, repeated_annotation, shares]


@many(300)
@given(data=st.data(), seed=st.integers(0, 50))
def test_a_damaged_file_is_refused_or_read_like_the_repaired_one(tmp_path_factory, data, seed):
    content, detections = scene(seed)
    damaged, repaired = data.draw(damages(content))
    path = tmp_path_factory.mktemp("damaged") / "annotations.json"
    path.write_text(json.dumps(damaged))
    try:
        found = read_annotations(str(path), Needs(max_bad=0.25, to_train=True))
    except NATSError as error:
        assert len(str(error).splitlines()) == 1 and str(path) in str(error)
        return
    assert repaired is not None, damaged
    assert numbers(found.content, detections) == numbers(repaired, detections)
    expected = to_records(read_back(repaired, path), "")
    assert order_free(to_records(found, "")) == order_free(expected)


def read_back(content, path):
    path.write_text(json.dumps(content))
    return read_annotations(str(path), Needs())


def order_free(records):
    for record in records:
        record["annotations"].sort(key=str)
    return records


def test_the_digest_tells_data_apart(read):
    first = to_records(read(coco()), "folder")
    assert digest(first) == digest(to_records(read(coco()), "elsewhere"))
    for place, change in enumerate([{"bbox": [1, 2, 10, 19]}, {"category_id": 7}, {"iscrowd": 1}]):
        content = coco()
        content["annotations"][place * 2].update(change)
        assert digest(to_records(read(content), "folder")) != digest(first)
    assert digest(first[1:]) != digest(first)
