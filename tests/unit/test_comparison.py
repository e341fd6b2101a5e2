"""A study's parts: methods, folds, how runs share a machine, tables and intervals."""

import argparse
import json
import math
from pathlib import Path

import folds
import jobs
import pytest
import tables
from methods import Method, file_argument, method_argument, training

from detectron2.config import get_cfg
from detectron2_nats import Architecture, NATSError

RESULTS = Path(__file__).parents[2] / "study/results"
CATEGORIES = [{"id": 3, "name": "cell"}]

# -- methods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, kind, search, length",
    [
        ("plain-1.5x", "plain", "", 1.5),
        ("path-random-2x", "path-random", "", 2),
        ("5x1-1.25x", "5x1", "", 1.25),
        ("path-warm-1.5x", "path-warm", "path", 1.5),
    ],
)
def test_methods(name, kind, search, length):
    method = method_argument(name)
    assert (method.name, method.kind, method.search, method.length) == (name, kind, search, length)
    with pytest.raises(argparse.ArgumentTypeError, match="NAME not being a method"):
        file_argument(f"{name}=file.yaml")


def test_a_length_stretches_the_schedule():
    solver = get_cfg().SOLVER
    solver.MAX_ITER, solver.STEPS = 400, (320, 390)
    words = ["SOLVER.MAX_ITER", "600", "SOLVER.STEPS", "(480, 585)"]
    assert training(Method.of("plain-1.5x"), solver) == words


# -- folds -----------------------------------------------------------------------------------------


def annotation_file(path, names, categories=CATEGORIES):
    """A COCO file whose ids begin at 1, as those of separate splits do."""
    numbers = range(1, len(names) + 1)
    images = [{"id": i, "file_name": names[i - 1], "width": 64, "height": 64} for i in numbers]
    box = {"category_id": 3, "area": 200, "iscrowd": 0}
    boxes = [{"id": i, "image_id": i, "bbox": [i, 5, 20, 10], **box} for i in numbers]
    content = {"images": images, "annotations": boxes, "categories": categories}
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def merged(tmp_path):
    one = annotation_file(tmp_path / "one.json", [f"a{i}.jpg" for i in range(11)])
    two = annotation_file(tmp_path / "two.json", [f"b{i}.jpg" for i in range(9)])
    return folds.merged_annotations([one, two])


def test_merging_keeps_each_box_with_its_image(merged):
    assert len(merged["images"]) == len(merged["annotations"]) == 20
    assert len({i["id"] for i in merged["images"]}) == len({a["id"] for a in merged["annotations"]})
    name = {image["id"]: image["file_name"] for image in merged["images"]}
    boxes = {name[a["image_id"]]: a["bbox"][0] for a in merged["annotations"]}
    assert boxes["a4.jpg"] == 5 and boxes["b4.jpg"] == 5 and boxes["b8.jpg"] == 9


@pytest.mark.parametrize(
    "names, categories, words",
    [
        (["a1.jpg"], CATEGORIES, "a1.jpg is in two files"),
        (["c1.jpg"], [{**c, "name": "nucleus"} for c in CATEGORIES], "its categories differ"),
        (["c1.jpg"], [{"id": 1}], "two.json: not COCO's annotation format"),
        (None, None, "two.json: cannot be read"),
    ],
)
def test_files_that_do_not_go_together(tmp_path, names, categories, words):
    one = annotation_file(tmp_path / "one.json", ["a1.jpg"])
    if names:
        annotation_file(tmp_path / "two.json", names, categories)
    with pytest.raises(NATSError, match=words):
        folds.merged_annotations([one, str(tmp_path / "two.json")])


def test_every_image_is_tested_once_and_never_trained_on_then(merged):
    splits = folds.cut(merged, 4)
    for content in splits.values():
        ids = {image["id"] for image in content["images"]}
        assert {a["image_id"] for a in content["annotations"]} == ids
    files = {name: {i["file_name"] for i in split["images"]} for name, split in splits.items()}
    everything = {image["file_name"] for image in merged["images"]}
    tested = [files[f"fold_{fold}/test"] for fold in range(4)]
    assert set.union(*tested) == everything and sum(map(len, tested)) == len(everything)
    for fold in range(4):
        names = (f"fold_{fold}/{split}" for split in ("rest", "train", "calibration"))
        rest, train, calibration = (files[name] for name in names)
        assert rest == everything - tested[fold]
        assert train | calibration == rest and not train & calibration
        assert len(calibration) == 4  # 0.3 of 15
    assert folds.cut(merged, 4) == splits
    with pytest.raises(NATSError, match="too few for 7 folds"):
        folds.cut(merged, 7)


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A function: Python code → a job that runs it."""
    monkeypatch.setattr(jobs, "program", lambda command: [jobs.sys.executable, *command])
    return lambda code, name="run": jobs.Job(str(tmp_path / name), lambda: ["-c", code])


def test_when_one_fails_the_others_are_stopped(job, tmp_path):
    ready = tmp_path / "ready"
    stops = "signal.signal(signal.SIGTERM, lambda *_: exit(75))"
    waits = job(f"import signal, time; {stops}; open('{ready}', 'w'); time.sleep(60)", "waits")
    after = f"while not os.path.exists('{ready}'): time.sleep(0.01)"
    fails = job(f"import os, time\n{after}\nprint('error: no luck'); exit(2)", "fails")
    with pytest.raises(NATSError, match="exit status 2, see .*fails/console.txt: error: no luck"):
        jobs.run_jobs([waits, fails], 2)
    assert waits._process.returncode == 75 and not waits.done


# -- tables ----------------------------------------------------------------------------------------


def test_paired_interval_by_hand():
    # mean 2, standard deviation 1, three values: t = 4.302653 with two degrees of freedom
    mean, half = tables.paired_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert tables.paired_interval([1.5]) == (1.5, math.inf)


def test_agreement_by_hand():
    one = Architecture({"res3.0.conv2": [[2, 1, 1], [2, 3, 3]]})
    other = Architecture({"res3.0.conv2": [[1, 1, 1], [1, 3, 3], [1, 1, 1], [1, 3, 3]]})
    assert tables.agreement([one, other]) == (0.5, 0.5)
    assert tables.agreement([one, one]) == (1, 0.5)


def test_published_tables_follow_from_their_numbers():
    text = tables.tables(json.loads((RESULTS / "bars_lying.json").read_text()))
    page = (RESULTS / "bars.md").read_text()
    for cell in ("+45.9 [+44.7, +47.0]", "+31.4 [+29.4, +33.5]", "77.0 ± 0.2"):
        assert cell in text and cell in page
    assert "1×3 100% |" in text and "| nats-warm  |     80.8 |" in text
    text = tables.tables(json.loads((RESULTS / "car_parts_res3_320_gpu.json").read_text()))
    assert "+6.9 [+5.9, +8.0]" in text and "AP of each class" in text
