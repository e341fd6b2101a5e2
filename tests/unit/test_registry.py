"""Own data sets: registration, and what is checked before a run."""

import argparse
import json
from unittest import mock

import pytest
import torch
from PIL import Image
from test_annotations import coco

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from detectron2_nats import NATSError, add_nats_config
from detectron2_nats.commands import train
from detectron2_nats.config import load_config
from detectron2_nats.data.registry import (
    check_data,
    check_datasets,
    check_registered_classes,
    register_datasets,
)
from detectron2_nats.engine.evaluation import build_evaluator

NAME = "nats_test_registry"


@pytest.fixture(autouse=True)
def forget():
    yield
    for name in [n for n in DatasetCatalog.list() if n.startswith(NAME)]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def register(tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(coco()))
    cfg = get_cfg()
    add_nats_config(cfg)
    cfg.DATASETS.REGISTER = [[NAME, str(path), str(tmp_path)]]
    register_datasets(cfg)
    return cfg, path


def test_registers_and_loads(tmp_path):
    cfg, path = register(tmp_path)
    check_datasets([NAME], "DATASETS.TRAIN")
    records = DatasetCatalog.get(NAME)
    assert [r["file_name"] for r in records] == [str(tmp_path / f"{i}.png") for i in range(10)]
    assert [r["annotations"][0]["category_id"] for r in records] == [0, 1] * 5
    meta = MetadataCatalog.get(NAME)
    assert meta.thing_classes == ["cat", "dog"] and meta.evaluator_type == "coco"
    register_datasets(cfg)  # the same again is fine
    for name, folder in ((NAME, "elsewhere"), ("coco_2017_train", str(tmp_path))):
        cfg.DATASETS.REGISTER = [[name, str(path), folder]]
        with pytest.raises(NATSError, match=f"DATASETS.REGISTER: the name '{name}' is taken"):
            register_datasets(cfg)


@pytest.mark.parametrize("entry", [["a", "b"], ["", "b", "c"], None])
def test_malformed_entries(entry):
    cfg = get_cfg()
    add_nats_config(cfg)
    cfg.DATASETS.REGISTER = [entry]
    with pytest.raises(NATSError, match=r"expected \[name, annotation json, image folder\], got"):
        register_datasets(cfg)


# -- where files are looked for -------------------------------------------------------------------

CORRECT = r"\. Correct DATASETS.REGISTER, a list of \[name, annotation json, image folder\]$"


@pytest.mark.parametrize(
    "json_file, folder, words",
    [
        ("none.json", ".", "annotation file not found, looked for {}/none.json"),
        ("a.json", "none", "image folder not found, looked for {}/none"),
        (".", "a.json", "annotation file not found, looked for {}"),  # exchanged
    ],
)
def test_missing_files_of_own_data(tmp_path, json_file, folder, words):
    (tmp_path / "a.json").touch()
    paths = {"json_file": str(tmp_path / json_file), "image_root": str(tmp_path / folder)}
    DatasetCatalog.register(NAME, list)
    MetadataCatalog.get(NAME).set(**paths)
    words = f"^DATASETS.TRAIN: {NAME}: {words.format(tmp_path)}.*{CORRECT}"
    with pytest.raises(NATSError, match=words):
        check_datasets([NAME], "DATASETS.TRAIN")


@pytest.mark.parametrize(
    "name, words",
    [
        ("coco_2017_train", "annotation file not found, looked for /.* Set DETECTRON2_DATASETS"),
        ("coco_2014_minival", "annotation file not found, looked for /.* tools/make_val35k.py"),
        ("coco_2017_trian", "'coco_2017_trian' is registered, did you mean coco_2017_train"),
        ("mine", "no data set 'mine' is registered.*DATASETS.REGISTER"),
    ],
)
def test_missing_and_unknown_names(name, words):
    with pytest.raises(NATSError, match=f"^DATASETS.TEST: .*{words}"):
        check_datasets([name], "DATASETS.TEST")


# -- before a run ---------------------------------------------------------------------------------


def run_config(tmp_path, *opts, count=4, **contents):
    """A config whose data sets TRAIN, CALIBRATION and TEST have these contents, and images."""
    for i in range(count):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{i}.png")
    cfg = load_config("", ["MODEL.ROI_HEADS.NUM_CLASSES", "2", *opts])
    for key in ("TRAIN", "CALIBRATION", "TEST"):
        path = tmp_path / f"{key}.json"
        path.write_text(json.dumps({**coco(count), **contents.get(key, {})}))
        cfg.DATASETS.REGISTER.append([f"{NAME}_{key}", str(path), str(tmp_path)])
        cfg.DATASETS[key] = (f"{NAME}_{key}",)
    register_datasets(cfg)
    return cfg


ALL = ("TRAIN", "CALIBRATION", "TEST")


def categories(*names):
    return [{"id": id, "name": name} for id, name in zip((3, 7, 9), names)]


def test_the_classes_of_a_checkpoint(tmp_path):
    check_data(run_config(tmp_path), ALL, ["cat", "dog"])
    check_registered_classes(run_config(tmp_path))
    with pytest.raises(NATSError, match="DATASETS.TEST: .* 'cat', of the detector it is 'dog'"):
        check_data(run_config(tmp_path), ["TEST"], ["dog", "cat"])


@pytest.mark.parametrize("key", ["CALIBRATION", "TEST"])
@pytest.mark.parametrize(
    "names, message",
    [
        (("dog", "cat"), "class 0 is 'dog', of .*_TRAIN it is 'cat'"),
        (("cat", "cow"), "class 1 is 'cow', of .*_TRAIN it is 'dog'"),
        (("cat", "dog", "cow"), "class 2 is 'cow', of .*_TRAIN it is not there"),
    ],
)
def test_classes_that_differ_between_the_splits(tmp_path, key, names, message):
    cfg = run_config(tmp_path, **{key: {"categories": categories(*names)}})
    with pytest.raises(NATSError, match=f"DATASETS.{key}: {NAME}_{key}: {message}.*same ids"):
        check_data(cfg, ALL)
    with pytest.raises(NATSError, match="DATASETS.TEST: .*: class .|3 classes"):
        check_data(cfg, ["TEST"])  # only the number can be known
        check_registered_classes(cfg)


def test_an_evaluation_knows_the_classes_of_all_that_is_registered(tmp_path, monkeypatch):
    """Weights of older versions, and of others, do not say what they were trained on."""
    cfg = run_config(tmp_path, TEST={"categories": categories("dog", "cat")})
    weights = mock.Mock(**{"return_value.resume_or_load.return_value": {}})
    monkeypatch.setattr(train, "SafeCheckpointer", weights)
    monkeypatch.setattr(train, "build_model", mock.Mock())
    trainer = mock.Mock()
    args = argparse.Namespace(eval_only=True, resume=False)
    with pytest.raises(NATSError, match=f"{NAME}_TEST: class 0 is 'dog', of {NAME}_TRAIN"):
        train.train_or_evaluate(trainer, cfg, args)
    assert not trainer.test.called


@pytest.mark.parametrize(
    "architecture, node",
    [
        ("GeneralizedRCNN", "ROI_HEADS"),
        ("RetinaNet", "RETINANET"),
        ("ProposalNetwork", ""),
    ],
)
def test_the_number_of_classes(tmp_path, architecture, node):
    cfg = run_config(tmp_path, "MODEL.META_ARCHITECTURE", architecture)
    if not node:
        check_data(cfg, ALL)
        return
    cfg.MODEL[node].NUM_CLASSES = 80
    with pytest.raises(NATSError, match=f"2 classes, the model 80: set MODEL.{node}.NUM_CLASSES 2"):
        check_data(cfg, ALL)


def test_what_python_code_registered_is_checked_too(tmp_path):
    """Detectron2 reads it, and would leave out or trip over what is at fault."""
    content = coco(4)
    content["annotations"][2]["bbox"] = [1, 2, 0, 5]
    path = tmp_path / "python.json"
    path.write_text(json.dumps(content))
    cfg = run_config(tmp_path)
    register_coco_instances(f"{NAME}_python", {}, str(path), str(tmp_path))
    cfg.DATASETS.TEST = (f"{NAME}_python",)
    with pytest.raises(NATSError, match="2.png, annotation id 102: box has no size.*clean_coco"):
        check_data(cfg, ["TEST"])
    content["annotations"][2]["bbox"] = [1, 2, 3, 5]
    path.write_text(json.dumps(content))
    check_data(cfg, ["TEST"])


def test_a_data_set_without_a_file(tmp_path):
    cfg = run_config(tmp_path)
    DatasetCatalog.register(f"{NAME}_list", lambda: DatasetCatalog.get(f"{NAME}_TRAIN")[:2])
    MetadataCatalog.get(f"{NAME}_list").thing_classes = ["cat", "dog"]
    cfg.DATASETS.TEST = (f"{NAME}_list",)
    check_data(cfg, ALL)
    (tmp_path / "1.png").unlink()
    with pytest.raises(NATSError, match=f"{NAME}_list: 1 of 2 images cannot be read, .*1.png"):
        check_data(cfg, ["TEST"])
    DatasetCatalog.register(f"{NAME}_empty", list)
    cfg.DATASETS.TEST = (f"{NAME}_empty",)
    with pytest.raises(NATSError, match=f"DATASETS.TEST: {NAME}_empty contains no images"):
        check_data(cfg, ["TEST"])


def test_keypoints(tmp_path):
    cfg = run_config(tmp_path, "MODEL.KEYPOINT_ON", "True")
    with pytest.raises(NATSError, match="keypoints need names and a map"):
        check_data(cfg, ALL)
    check_data(cfg, ["TEST"])
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 5
    with pytest.raises(NATSError, match="5 numbers in TEST.KEYPOINT_OKS_SIGMAS"):
        check_data(cfg, ["TEST"])
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1] * 5
    check_data(cfg, ["TEST"])


def test_more_than_a_hundred_detections_are_counted(tmp_path):
    """As lines of text on a page; COCO's evaluation counts 100 unless it is told otherwise."""
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 480}
        | {"bbox": [i % 15 * 32, i // 15 * 32, 20, 24]}
        for i in range(150)
    ]
    image = {"id": 1, "file_name": "a.png", "width": 512, "height": 512}
    categories = [{"id": 1, "name": "line"}]
    content = {"images": [image], "annotations": annotations, "categories": categories}
    (tmp_path / "dense.json").write_text(json.dumps(content))
    cfg = load_config("", ["TEST.DETECTIONS_PER_IMAGE", "200", "OUTPUT_DIR", str(tmp_path)])
    cfg.DATASETS.REGISTER = [["nats_test_dense", str(tmp_path / "dense.json"), str(tmp_path)]]
    cfg.DATASETS.TEST = ("nats_test_dense",)
    register_datasets(cfg)
    DatasetCatalog.get("nats_test_dense")
    evaluator = build_evaluator(cfg, "nats_test_dense")
    evaluator.reset()
    boxes = torch.tensor([a["bbox"] for a in annotations]).float()
    boxes[:, 2:] += boxes[:, :2]
    found = Instances((512, 512), pred_boxes=Boxes(boxes), scores=torch.linspace(0.9, 0.5, 150))
    found.pred_classes = torch.zeros(150, dtype=torch.int64)
    evaluator.process([{"image_id": 1}], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
