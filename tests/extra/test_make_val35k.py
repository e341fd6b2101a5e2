"""tools/make_val35k.py on small fake COCO files."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.builtin import _PREDEFINED_SPLITS_COCO

SCRIPT = Path(__file__).resolve().parents[2] / "tools/make_val35k.py"
MINIVAL, VAL35K = "instances_minival2014.json", "instances_valminusminival2014.json"
VAL2014_IDS = [3, 1, 9, 4, 7]


def write(folder, split, ids):
    """Fake annotations: image i has i % 3 boxes, so that some have none."""
    sizes = {"height": 20, "width": 30, "license": 1}
    box = {"category_id": 5, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}
    of_box = [image_id for image_id in ids for _ in range(image_id % 3)]
    content = {
        "info": {"year": 2014},
        "licenses": [],
        "images": [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg", **sizes} for i in ids],
        "annotations": [{"id": n, "image_id": i, **box} for n, i in enumerate(of_box, 1)],
        "categories": [{"id": 5, "name": "airplane"}],
    }
    (folder / f"instances_{split}.json").write_text(json.dumps(content))
    return content


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "val2014", VAL2014_IDS)
    write(tmp_path, "val2017", [9, 1])
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch):
    """A function that runs the script on the folder and returns its exit status."""

    def run_script(*more):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--annotations", str(folder), *more])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as left:
            return left.code
        return 0

    return run_script


def test_parts_are_disjoint_complete_and_where_detectron2_expects_them(folder, run, capsys):
    assert run() == 0
    val2014, minival, val35k = (
        json.loads((folder / name).read_text())
        for name in ("instances_val2014.json", MINIVAL, VAL35K)
    )
    assert [image["id"] for image in minival["images"]] == [1, 9]  # in the order of val2014
    assert [image["id"] for image in val35k["images"]] == [3, 4, 7]
    for key in ("images", "annotations"):
        both = minival[key] + val35k[key]
        assert sorted(both, key=lambda x: x["id"]) == sorted(val2014[key], key=lambda x: x["id"])
    for part in (minival, val35k):
        assert {a["image_id"] for a in part["annotations"]} <= {i["id"] for i in part["images"]}
        assert all(part[key] == val2014[key] for key in ("info", "licenses", "categories"))
    for split, ids in (("minival", [1, 9]), ("valminusminival", [3, 4, 7])):
        expected = Path(_PREDEFINED_SPLITS_COCO["coco"][f"coco_2014_{split}"][1])
        assert expected.parent.as_posix() == "coco/annotations"
        records = load_coco_json(str(folder / expected.name), "val2014")
        assert [len(r["annotations"]) for r in records] == [i % 3 for i in ids]
    printed = capsys.readouterr()
    assert f"{VAL35K}: 3 images, 2 annotations" in printed.out
    assert "has 3 images, in COCO it has 35504" in printed.err


def test_existing_files_are_replaced_only_by_force(folder, run, capsys):
    (folder / VAL35K).write_text("mine")
    assert run() == 2
    assert "--force" in capsys.readouterr().err
    assert (folder / VAL35K).read_text() == "mine" and not (folder / MINIVAL).exists()
    assert run("--force") == 0
    assert len(json.loads((folder / VAL35K).read_text())["images"]) == 3


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: (f / "instances_val2017.json").unlink(), "instances_val2017.json is missing"),
        (lambda f: write(f, "val2017", [1, 12, 11]), "2 of the 3 images .* such as id 11"),
        (lambda f: write(f, "val2017", []), f"{MINIVAL} would have no images"),
        (lambda f: (f / "instances_val2014.json").write_text('{"images": ['), "not a COCO instan"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folder, run, capsys, change, words):
    change(folder)
    before = {*folder.iterdir()}
    assert run() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and re.search(words, line), line
    assert {*folder.iterdir()} == before
