"""Own annotation files in searches, trainings and evaluations."""

import argparse
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import make_trainer

from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_train_loader,
)
from detectron2_nats import NATSError, SearchTrainer
from detectron2_nats.commands import train
from detectron2_nats.config import load_config
from detectron2_nats.data.registry import register_datasets
from detectron2_nats.engine import evaluation
from detectron2_nats.engine.checkpoint import SafeCheckpointer

NAME = "nats_test_own"


@pytest.fixture(autouse=True)
def forget():
    yield
    for name in [n for n in DatasetCatalog.list() if n.startswith(NAME)]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def write(tmp_path, split, count=4, **annotation):
    """A COCO file of `count` images with a box each, of five classes."""
    images, annotations = [], []
    for i in range(count):
        name = f"{split}{i}.png"
        Image.new("RGB", (64, 64), (40 * i, 20 * len(split), 200 - 30 * i)).save(tmp_path / name)
        images.append({"id": i, "file_name": name, "width": 64, "height": 64})
        box = [8 + i, 8, 40, 30]
        annotations.append(
            {
                "id": i + 1,
                "image_id": i,
                "category_id": i % 5 + 1,
                "bbox": box,
                "area": 1200,
                "iscrowd": 0,
                **annotation,
            }
        )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate("abcde")]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = tmp_path / f"{split}.json"
    path.write_text(json.dumps(content))
    return path


def options(tmp_path, *splits):
    register = [[f"{NAME}_{s}", str(tmp_path / f"{s}.json"), str(tmp_path)] for s in splits]
    chosen = {"train": "TRAIN", "calibration": "CALIBRATION", "val": "TEST"}
    opts = ["DATASETS.REGISTER", repr(register)]
    for split in splits:
        opts += [f"DATASETS.{chosen[split]}", repr((f"{NAME}_{split}",))]
    return opts


def trainer_on(tiny_config, tmp_path, *opts, kind="search"):
    opts = [*options(tmp_path, "train", "calibration", "val"), *opts]
    register_datasets(load_config(tiny_config, opts))
    return make_trainer(tiny_config, tmp_path / "run", *opts, kind=kind)


def test_one_start_parses_each_file_once(tiny_config, tmp_path, monkeypatch):
    """Before the first step. An evaluation parses the test file again, in pycocotools."""
    paths = {split: str(write(tmp_path, split)) for split in ("train", "calibration", "val")}
    parsed: Counter = Counter()
    load = json.load
    monkeypatch.setattr(json, "load", lambda file: parsed.update([file.name]) or load(file))
    cfg = load_config(tiny_config, [*options(tmp_path, *paths), "OUTPUT_DIR", str(tmp_path)])
    train.setup(cfg.clone(), argparse.Namespace(eval_only=False, config_file="", opts=[]))
    SearchTrainer(cfg)
    assert {path: parsed[path] for path in paths.values()} == dict.fromkeys(paths.values(), 1)


# -- runs -----------------------------------------------------------------------------------------


def test_an_evaluation_that_fails_withholds_no_result(tiny_config, tmp_path):
    for split in ("train", "calibration", "val"):
        write(tmp_path, split)
    for resumed in (False, True):
        trainer = trainer_on(tiny_config, tmp_path, "SOLVER.MAX_ITER", 2)
        trainer.test = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        assert (tmp_path / "run/retrain.yaml").is_file()
        assert (tmp_path / "run/architecture.yaml").is_file()
        assert load_config(str(tmp_path / "run/retrain.yaml")).MODEL.NATS.ARCHITECTURE
        (tmp_path / "run/retrain.yaml").unlink()


@pytest.mark.parametrize("kind", ["search", "train"])
@pytest.mark.parametrize("changed", [{"count": 5}, {"iscrowd": 0, "bbox": [9, 9, 9, 9]}])
def test_a_run_is_not_resumed_on_other_data(tiny_config, tmp_path, kind, changed):
    for split in ("train", "calibration", "val"):
        write(tmp_path, split)
    plain = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"] if kind == "train" else []
    trainer_on(tiny_config, tmp_path, *plain, kind=kind).save_checkpoint("model_0000001")
    trainer_on(tiny_config, tmp_path, *plain, kind=kind)  # the same data will do
    split = "calibration" if kind == "search" else "train"
    write(tmp_path, split, **changed)
    with pytest.raises(NATSError, match=f"is of a run on other data: {NAME}_{split} had 4 images"):
        trainer_on(tiny_config, tmp_path, *plain, kind=kind)


def test_a_checkpoint_tells_its_classes(tiny_config, tmp_path):
    for split in ("train", "calibration", "val"):
        write(tmp_path, split)
    trainer = trainer_on(tiny_config, tmp_path)
    trainer.save_checkpoint("model_0000001")
    loaded = SafeCheckpointer(trainer.model).load(str(tmp_path / "run/model_0000001.pth"))
    assert loaded["classes"] == ["a", "b", "c", "d", "e"]


def test_an_evaluation_needs_all_weights(tiny_config, tmp_path):
    trainer = make_trainer(tiny_config, tmp_path / "run")
    checkpointer = SafeCheckpointer(trainer.model)
    checkpointer.load("", checkpointables=[])
    with pytest.raises(NATSError, match="no file: .* weights are missing"):
        checkpointer.check_complete()
    weights = {k: v for k, v in trainer.model.state_dict().items() if "box_predictor" not in k}
    torch.save({"model": weights}, tmp_path / "some.pth")
    checkpointer.load(str(tmp_path / "some.pth"), checkpointables=[])
    with pytest.raises(NATSError, match="some.pth: 4 of .* the first roi_heads.box_predictor"):
        checkpointer.check_complete()
    torch.save({"model": trainer.model.state_dict()}, tmp_path / "all.pth")
    checkpointer.load(str(tmp_path / "all.pth"), checkpointables=[])
    checkpointer.check_complete()


@pytest.mark.parametrize(
    "kind, words",
    [
        (
            None,
            f"no evaluator for data set '{NAME}_far' of type None: expected evaluator_type coco",
        ),
        ("lvis", f"the evaluation of '{NAME}_far' needs lvis, which is not installed here"),
    ],
)
def test_a_test_set_that_cannot_be_evaluated_is_refused_at_the_start(
    tiny_config, tmp_path, monkeypatch, kind, words
):
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    DatasetCatalog.register(f"{NAME}_far", lambda: DatasetCatalog.get("nats_embedded_val"))
    MetadataCatalog.get(f"{NAME}_far").set(**({"evaluator_type": kind} if kind else {}))
    opts = ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", repr((f"{NAME}_far",))]
    with pytest.raises(NATSError, match=words):
        SearchTrainer(load_config(tiny_config, opts))


def test_a_searchs_config_is_not_trained(tiny_config):
    with pytest.raises(NATSError, match="tiny.yaml describes a search.*search_net.py"):
        train.train(load_config(tiny_config), argparse.Namespace(config_file=tiny_config))


def test_a_subclasss_own_loader_is_used_for_both_kinds_of_step(tiny_config, tmp_path):
    """Detectron2's usual way to mappers and augmentations of one's own."""
    seen = set()

    class Mapper(DatasetMapper):
        def __call__(self, record):
            seen.add(Path(record["file_name"]).parent.name)
            return super().__call__(record)

    class Own(SearchTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_detection_train_loader(cfg, mapper=Mapper(cfg, is_train=True))

    cfg = load_config(tiny_config, ["OUTPUT_DIR", str(tmp_path), "SEARCH.ALPHA_START", "0.0"])
    trainer = Own(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert seen == {"train", "calibration"}
