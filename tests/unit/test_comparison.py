"""Folds, statistics and architectures of a study."""

import json
import math
import statistics

import numpy as np
import pytest
from oracles import FPN_RESNET, tiny_cfg

from detectron2_nats import Architecture, NATSError
from detectron2_nats.bench import baselines
from detectron2_nats.bench.study import folds, intervals
from detectron2_nats.show.pictures import plot_study

CATEGORIES = [{"id": 3, "name": "cell"}]


def annotation_file(path, names, categories=CATEGORIES):
    """A COCO file whose ids begin at 1, as those of separate splits do."""
    images = [
        {"id": i, "file_name": n, "width": 64, "height": 64} for i, n in enumerate(names, start=1)
    ]
    boxes = [
        {
            "id": i,
            "image_id": i,
            "category_id": 3,
            "bbox": [i, 5, 20, 10],
            "area": 200,
            "iscrowd": 0,
        }
        for i in range(1, len(names) + 1)
    ]
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
        (["c1.jpg"], [{"id": 1}], "not COCO's annotation format"),
    ],
)
def test_files_that_do_not_go_together(tmp_path, names, categories, words):
    one = annotation_file(tmp_path / "one.json", ["a1.jpg"])
    two = annotation_file(tmp_path / "two.json", names, categories)
    with pytest.raises(NATSError, match=words):
        folds.merged_annotations([one, two])
    with pytest.raises(NATSError, match="missing.json"):
        folds.merged_annotations([str(tmp_path / "missing.json")])


def read(folder, fold, name):
    content = json.loads((folder / f"fold_{fold}" / f"{name}.json").read_text())
    assert {a["image_id"] for a in content["annotations"]} == {i["id"] for i in content["images"]}
    return {image["file_name"] for image in content["images"]}


def test_every_image_is_tested_once_and_never_trained_on_then(merged, tmp_path):
    folds.write_folds(merged, 4, str(tmp_path))
    everything = {image["file_name"] for image in merged["images"]}
    tested = [read(tmp_path, fold, "test") for fold in range(4)]
    assert set.union(*tested) == everything and sum(map(len, tested)) == len(everything)
    for fold in range(4):
        rest = read(tmp_path, fold, "rest")
        train, calibration = (read(tmp_path, fold, n) for n in ("train", "calibration"))
        assert rest == everything - tested[fold]
        assert train | calibration == rest and not train & calibration
        assert len(calibration) == 4  # 0.3 of 15
    before = (tmp_path / "fold_2/train.json").read_text()
    folds.write_folds(merged, 4, str(tmp_path))
    assert (tmp_path / "fold_2/train.json").read_text() == before
    with pytest.raises(NATSError, match="too few for 7 folds"):
        folds.write_folds(merged, 7, str(tmp_path))


def test_pooled_ap_of_perfect_and_of_no_detections(merged, tmp_path):
    folds.write_folds(merged, 2, str(tmp_path))
    truth = str(tmp_path / "all.json")
    perfect = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in merged["annotations"]
    ]
    files = []
    for name, part in (("one", perfect[:10]), ("two", perfect[10:]), ("none", [])):
        (tmp_path / name).write_text(json.dumps(part))
        files.append(str(tmp_path / name))
    assert folds.pooled_ap(truth, files[:2]) == pytest.approx(100)
    assert folds.pooled_ap(truth, files[2:]) == 0
    assert 45 < folds.pooled_ap(truth, files[::2]) < 55  # half of the boxes are found


def test_paired_interval_by_hand():
    # mean 2, standard deviation 1, three values: t = 4.302653 with two degrees of freedom
    mean, half = intervals.paired_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert intervals.paired_interval([1.5]) == (1.5, math.inf)


def test_the_interval_covers_and_the_detectable_difference_is_detected():
    rng = np.random.default_rng(0)
    runs = rng.normal(0.7, 1.3, size=(2000, 5))
    each = [intervals.paired_interval(run) for run in runs]
    covered = statistics.mean(abs(mean - 0.7) <= half for mean, half in each)
    assert 0.93 < covered < 0.97
    # the rule of thumb is close: power of 80 % at the difference that it names
    difference = intervals.detectable_difference({"a": [-1.0, 1.0] * 3})
    deviation = np.std([-1, 1] * 3, ddof=1)
    found = rng.normal(difference, deviation, size=(4000, 6))
    each = [intervals.paired_interval(run) for run in found]
    assert 0.75 < statistics.mean(abs(m) > h for m, h in each) < 0.85
    assert intervals.detectable_difference({"a": [1.0]}) == math.inf


def test_random_architectures_fit_differ_by_seed_and_use_all_genotypes():
    cfg = tiny_cfg(FPN_RESNET)
    cfg.MODEL.BACKBONE.NAME = "build_nats_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    one, same, other = (baselines.random_architecture(cfg, seed) for seed in (1, 1, 2))
    assert one == same and one != other
    dilations = {run[1:] for runs in one.layers.values() for run in runs}
    assert {(1, 1), (3, 3)} <= dilations


def test_agreement_by_hand():
    one = Architecture({"res3.0.conv2": [(8, 1, 1), (8, 3, 3)]})
    other = Architecture({"res3.0.conv2": [(4, 1, 1), (4, 3, 3), (8, 3, 3)]})
    seen, chance = baselines.agreement([one, other])
    assert seen == 0.75 and chance == 0.5 * 0.25 + 0.5 * 0.75
    assert baselines.agreement([one, one])[0] == 1
    assert baselines.dilation_shares([other]) == {(3, 3): 0.75, (1, 1): 0.25}


def test_the_picture_has_a_line_per_seed_and_a_mean_per_method():
    figure = plot_study({"plain": [40.0, 42.0], "random": [39.0, 40.0], "nats": [41.0, 44.0]}, "t")
    (axes,) = figure.axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[40, 39, 41], [42, 40, 44]]
    assert [text.get_text() for text in axes.texts] == ["41.0", "39.5", "42.5"]
