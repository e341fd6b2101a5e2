"""tools/make_val35k.py on small fake COCO files."""

import importlib.util
import json
from pathlib import Path

import pytest

from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.builtin import _PREDEFINED_SPLITS_COCO
from detectron2_nats.commands.cli import run_tool

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "make_val35k.py"
_spec = importlib.util.spec_from_file_location("make_val35k", SCRIPT)
make_val35k = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_val35k)

VAL2014_IDS = [3, 1, 9, 4, 7]
MINIVAL_IDS = [9, 1]


def coco(ids, name):
    """Fake annotations: image i has i % 3 boxes, so that some have none."""
    boxes = [image_id for image_id in ids for _ in range(image_id % 3)]
    return {
        "info": {"year": 2014},
        "licenses": [],
        "images": [
            {"id": i, "file_name": name.format(i), "height": 20, "width": 30, "license": 1}
            for i in ids
        ],
        "annotations": [
            {
                "id": index + 1,
                "image_id": image_id,
                "category_id": 5,
                "bbox": [1, 2, 3, 4],
                "area": 12,
                "iscrowd": 0,
            }
            for index, image_id in enumerate(boxes)
        ],
        "categories": [{"id": 5, "name": "airplane"}],
    }


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "val2014", coco(VAL2014_IDS, "COCO_val2014_{:012d}.jpg"))
    write(tmp_path, "val2017", coco(MINIVAL_IDS, "{:012d}.jpg"))
    return tmp_path


def write(folder, split, content):
    (folder / f"instances_{split}.json").write_text(json.dumps(content))


def run(folder, *more):
    """Returns the exit status."""
    args = make_val35k.parse_args(["--annotations", str(folder), *more])
    try:
        run_tool(make_val35k.main, args)
    except SystemExit as left:
        return left.code
    return 0


def assert_refused(folder, capsys, *words):
    assert run(folder) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error
    assert {p.name for p in folder.iterdir()} <= {
        "instances_val2014.json",
        "instances_val2017.json",
    }


def test_parts_are_disjoint_and_complete(folder):
    assert run(folder) == 0
    val2014 = json.loads((folder / "instances_val2014.json").read_text())
    minival = json.loads((folder / make_val35k.MINIVAL).read_text())
    val35k = json.loads((folder / make_val35k.VAL35K).read_text())

    assert [image["id"] for image in minival["images"]] == [1, 9]  # in the order of val2014
    assert [image["id"] for image in val35k["images"]] == [3, 4, 7]
    for key in ("images", "annotations"):
        both = minival[key] + val35k[key]
        assert sorted(both, key=lambda x: x["id"]) == sorted(val2014[key], key=lambda x: x["id"])
    for part in (minival, val35k):
        ids = {image["id"] for image in part["images"]}
        assert {a["image_id"] for a in part["annotations"]} <= ids
        for key in ("info", "licenses", "categories"):
            assert part[key] == val2014[key]


def test_detectron2_reads_them_where_it_expects_them(folder):
    assert run(folder) == 0
    for split, ids in (("minival", [1, 9]), ("valminusminival", [3, 4, 7])):
        expected = Path(_PREDEFINED_SPLITS_COCO["coco"][f"coco_2014_{split}"][1])
        assert expected.parent.as_posix() == "coco/annotations"
        dicts = load_coco_json(str(folder / expected.name), "val2014")
        assert [d["image_id"] for d in dicts] == ids
        assert [len(d["annotations"]) for d in dicts] == [i % 3 for i in ids]
        assert [d["file_name"] for d in dicts] == [
            f"val2014/COCO_val2014_{i:012d}.jpg" for i in ids
        ]


def test_what_it_prints(folder, capsys):
    assert run(folder) == 0
    result = capsys.readouterr()
    lines = result.out.splitlines()
    assert lines[0] == "instances_minival2014.json: 2 images, 1 annotations"
    assert lines[1] == "instances_valminusminival2014.json: 3 images, 2 annotations"
    files = [make_val35k.MINIVAL, make_val35k.VAL35K]
    assert lines[2:] == [f"wrote {folder / name}" for name in files]
    # The counts are not COCO's.
    assert "has 2 images, in COCO it has 5000" in result.err
    assert "has 3 images, in COCO it has 35504" in result.err


def test_default_folder_is_detectron2s(monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data")
    assert make_val35k.parse_args([]).annotations == Path("/data/coco/annotations")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert make_val35k.parse_args([]).annotations == Path("datasets/coco/annotations")


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        make_val35k.parse_args(["--help"])
    assert "$ DETECTRON2_DATASETS=" in capsys.readouterr().out


def test_existing_files_are_replaced_only_by_force(folder, capsys):
    (folder / make_val35k.VAL35K).write_text("mine")
    assert run(folder) == 2
    assert "--force" in capsys.readouterr().err
    assert (folder / make_val35k.VAL35K).read_text() == "mine"
    assert not (folder / make_val35k.MINIVAL).exists()
    assert run(folder, "--force") == 0
    assert len(json.loads((folder / make_val35k.VAL35K).read_text())["images"]) == 3


@pytest.mark.parametrize("split", ["val2014", "val2017"])
def test_missing_file(folder, capsys, split):
    (folder / f"instances_{split}.json").unlink()
    assert_refused(folder, capsys, f"instances_{split}.json is missing", "cocodataset.org")


def test_val2017_not_in_val2014(folder, capsys):
    write(folder, "val2017", coco([1, 9, 12, 11], "{:012d}.jpg"))
    assert_refused(folder, capsys, "2 of the 4 images of val2017 are not in val2014", "id 11")


@pytest.mark.parametrize("ids, name", [([], "minival2014"), (VAL2014_IDS, "valminusminival2014")])
def test_empty_part(folder, capsys, ids, name):
    write(folder, "val2017", coco(ids, "{:012d}.jpg"))
    assert_refused(folder, capsys, f"instances_{name}.json would have no images")


def test_not_json(folder, capsys):
    (folder / "instances_val2014.json").write_text('{"images": [')
    assert_refused(folder, capsys, "instances_val2014.json is not a COCO instances file")


@pytest.mark.parametrize("content", [[], {"images": {}}, {"images": [], "categories": []}])
def test_not_coco(folder, capsys, content):
    write(folder, "val2014", content)
    assert_refused(folder, capsys, "instances_val2014.json is not a COCO instances file")


def test_failed_write_leaves_nothing(folder, capsys, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(make_val35k.os, "replace", fail)
    assert run(folder) == 2
    path = folder / make_val35k.MINIVAL
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: {path}: cannot be written: disk full"
    assert {p.name for p in folder.iterdir()} == {
        "instances_val2014.json",
        "instances_val2017.json",
    }
