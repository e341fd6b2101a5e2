"""Own data sets: registration, and bad annotations."""

import json
import logging
import math
import re

import pytest

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2_nats import NATSError, add_nats_config
from detectron2_nats.data.registry import check_datasets, register_datasets

NAME = "nats_test_registry"


@pytest.fixture(autouse=True)
def forget():
    yield
    for name in [n for n in DatasetCatalog.list() if n.startswith(NAME)]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detectron2_nats"), "parent", logging.getLogger())
    return caplog


def lines(warnings):
    return [r.getMessage() for r in warnings.records if r.name.startswith("detectron2_nats")]


def coco(count=10, **changes):
    """`count` images of one box each, of two categories."""
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(count)
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


def register(tmp_path, content=None, share=0.2, name=NAME):
    path = tmp_path / "annotations.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(json.dumps(coco() if content is None else content))
    cfg = get_cfg()
    add_nats_config(cfg)
    cfg.RUN.MAX_BAD_DATA = share
    cfg.DATASETS.REGISTER = [[name, str(path), str(tmp_path)]]
    register_datasets(cfg)
    return cfg, path


def test_registers_and_loads(tmp_path, warnings):
    cfg, path = register(tmp_path)
    check_datasets([NAME], "DATASETS.TRAIN")
    records = DatasetCatalog.get(NAME)
    assert [r["file_name"] for r in records] == [str(tmp_path / f"{i}.png") for i in range(10)]
    assert [r["annotations"][0]["category_id"] for r in records] == [0, 1] * 5
    meta = MetadataCatalog.get(NAME)
    assert meta.thing_classes == ["cat", "dog"] and meta.evaluator_type == "coco"
    assert not lines(warnings)
    register_datasets(cfg)  # the same again is fine


def test_reads_as_detectron2_does(tmp_path):
    _, path = register(tmp_path)
    expected = load_coco_json(str(path), str(tmp_path), "nats_test_registry_plain")
    assert DatasetCatalog.get(NAME) == expected


def test_a_taken_name(tmp_path):
    cfg, path = register(tmp_path)
    for entry in ([NAME, str(path), "elsewhere"], ["coco_2017_train", str(path), str(tmp_path)]):
        cfg.DATASETS.REGISTER = [entry]
        with pytest.raises(NATSError, match=f"DATASETS.REGISTER: the name '{entry[0]}' is taken"):
            register_datasets(cfg)


@pytest.mark.parametrize(
    "entry", [[], ["a", "b"], ["a", "b", "c", "d"], ["a", "b", 3], ["", "b", "c"], "abc", None, 7]
)
def test_malformed_entries(entry):
    cfg = get_cfg()
    add_nats_config(cfg)
    cfg.DATASETS.REGISTER = [entry]
    with pytest.raises(NATSError, match=r"expected \[name, annotation json, image folder\], got"):
        register_datasets(cfg)


# -- where files are looked for -------------------------------------------------------------------


def test_missing_files_of_own_data(tmp_path):
    cfg, path = register(tmp_path)
    path.unlink()
    with pytest.raises(NATSError) as caught:
        check_datasets([NAME], "DATASETS.TRAIN")
    expected = f"DATASETS.TRAIN: {NAME}: annotation file not found, looked for {path}. "
    assert str(caught.value) == expected + "Correct the path in DATASETS.REGISTER"
    path.touch()
    MetadataCatalog.remove(NAME)
    MetadataCatalog.get(NAME).set(json_file=str(path), image_root=str(tmp_path / "nowhere"))
    with pytest.raises(NATSError, match=f"image folder not found, looked for {tmp_path}/nowhere"):
        check_datasets([NAME], "DATASETS.TRAIN")


@pytest.mark.parametrize(
    "name, cure",
    [
        ("coco_2017_train", "Download COCO and set DETECTRON2_DATASETS"),
        ("coco_2014_minival", "tools/make_val35k.py"),
        ("coco_2014_valminusminival", "tools/make_val35k.py"),
    ],
)
def test_missing_coco_says_how_to_get_it(name, cure):
    with pytest.raises(NATSError, match=f"{name}: annotation file not found, looked for /.*{cure}"):
        check_datasets([name], "DATASETS.TEST")


def test_unknown_names():
    with pytest.raises(NATSError, match="'coco_2017_trian' is registered, did you mean coco_2017_"):
        check_datasets(["coco_2017_trian"], "DATASETS.TRAIN")
    with pytest.raises(NATSError, match="no data set 'mine' is registered.*DATASETS.REGISTER"):
        check_datasets(["mine"], "DATASETS.TRAIN")


# -- bad annotations ------------------------------------------------------------------------------

BAD = [
    ({"bbox": [1, 2, 0, 20]}, r"box \[1, 2, 0, 20\] has no size"),
    ({"bbox": [1, 2, 10, -1]}, "has no size"),
    ({"bbox": [1, 2, 10]}, r"box \[1, 2, 10\] is not \[x, y, width, height\]"),
    ({"bbox": [1, 2, 10, math.nan]}, r"is not \[x, y, width, height\]"),
    ({"bbox": [1, 2, 10, math.inf]}, r"is not \[x, y, width, height\]"),
    ({"category_id": 4}, "category 4 is not in the list of categories"),
    ({"image_id": 99}, "image id 99 is not listed"),
]


@pytest.mark.parametrize("change, reason", BAD)
def test_a_bad_annotation_is_skipped_with_one_warning(tmp_path, warnings, change, reason):
    content = coco()
    for i in (4, 5):
        content["annotations"][i].update(change)
    register(tmp_path, content)
    records = DatasetCatalog.get(NAME)
    assert [len(r["annotations"]) for r in records] == [1] * 4 + [0] * 2 + [1] * 4
    (line,) = lines(warnings)
    where = "no listed image" if "image_id" in change else "4.png"
    path = tmp_path / "annotations.json"
    assert line.startswith(
        f"{path}: 2 of 10 annotations cannot be used, the first (id 104, {where})"
    )
    assert re.search(reason, line)


@pytest.mark.parametrize("change, reason", BAD)
def test_too_many_bad_annotations_stop_the_run(tmp_path, change, reason):
    content = coco()
    for i in (4, 5, 6):
        content["annotations"][i].update(change)
    register(tmp_path, content)
    with pytest.raises(NATSError, match="annotations.json: 3 of 10 .*RUN.MAX_BAD_DATA") as caught:
        DatasetCatalog.get(NAME)
    assert "\n" not in str(caught.value)
    caught.match(reason)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[" * 100000,
        b"\x89PNG\xff",
        [],
        "text",
        None,
        {"images": []},
        coco(images=[{"id": 1}]),
        coco(images=7),
        coco(images=[3]),
        coco(categories=[{}]),
        coco(categories=[{"id": []}]),
        coco(annotations=[{}]),
        coco(annotations=[7]),
        coco(annotations=5),
        coco(annotations={"a": 1}),
        coco(annotations=[{"id": 1, "image_id": 1, "category_id": 3, "bbox": None}]),
        coco(annotations=[{"id": 1, "image_id": 1, "category_id": 3, "bbox": ["a"] * 4}]),
        coco(annotations=[{"id": 1, "image_id": [1], "category_id": 3, "bbox": [1, 2, 3, 4]}]),
        coco(annotations=[{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}]),
        coco(annotations=[{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}] * 2),
        coco(images=[{"id": 1, "file_name": "1.png"}], annotations=[]),
    ],
)
def test_what_is_not_coco(tmp_path, content):
    register(tmp_path, b"null" if content is None else content)
    with pytest.raises(NATSError, match="annotations.json: not COCO's annotation format") as caught:
        DatasetCatalog.get(NAME)
    assert "\n" not in str(caught.value)
