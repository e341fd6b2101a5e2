"""The embedded data set, its registration and the embedded weights."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from detectron2_nats import NATSError
from detectron2_nats.toy import scenes, sets
from detectron2_nats.toy.catalog import register_embedded_datasets

ROOT = Path(__file__).parents[2]
COUNTS = {"train": 12, "calibration": 8, "val": 6}
SMALL = {name: replace(whole, splits=COUNTS) for name, whole in sets.SETS.items()}


@pytest.fixture(autouse=True)
def small_set_in_own_folder(tmp_path, monkeypatch):
    """Every test makes a small set of its own, if any."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(sets, "SETS", dict(SMALL))
    register_embedded_datasets()


@pytest.fixture(params=SMALL)
def dataset(request):
    return SMALL[request.param]


@pytest.fixture
def folder(tmp_path, dataset):
    path = tmp_path / "scenes"
    path.mkdir()
    sets.write_embedded_dataset(path, dataset)
    return path


def digests(folder):
    """Hash of every file in a folder by its relative path; of pixels where it is an image."""
    result = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        data = np.asarray(Image.open(path)) if path.suffix == ".png" else path.read_bytes()
        result[str(path.relative_to(folder))] = hashlib.sha256(bytes(data)).hexdigest()
    return result


def test_the_same_seed_gives_the_same_files(folder, tmp_path, dataset):
    again, other = tmp_path / "again", tmp_path / "other"
    again.mkdir()
    other.mkdir()
    np.random.seed(5)  # the global generator plays no part
    sets.write_embedded_dataset(again, dataset)
    sets.write_embedded_dataset(other, replace(dataset, seed=(1,)))
    assert digests(again) == digests(folder)
    assert not set(digests(other).values()) & set(digests(folder).values())


def test_splits_share_neither_images_nor_ids(folder):
    images = [hash_ for name, hash_ in digests(folder).items() if name.endswith(".png")]
    assert len(images) == sum(COUNTS.values()) == len(set(images))
    files = [json.loads((folder / f"instances_{split}.json").read_text()) for split in COUNTS]
    for key in ("images", "annotations"):
        ids = [entry["id"] for content in files for entry in content[key]]
        assert len(ids) == len(set(ids))


def test_is_valid_coco(folder, dataset):
    coco = COCO(str(folder / "instances_train.json"))
    assert len(coco.imgs) == COUNTS["train"]
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(dataset.classes)
    for image in coco.imgs.values():
        pixels = Image.open(folder / "train" / image["file_name"])
        assert (pixels.mode, pixels.size) == ("RGB", (image["width"], image["height"]))
        assert coco.getAnnIds(imgIds=[image["id"]])
    for annotation in coco.anns.values():
        image = coco.imgs[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        assert x >= 0 and y >= 0 and x + w <= image["width"] and y + h <= image["height"]
        # The box, the area and the polygon are those of one shape.
        mask = coco.annToMask(annotation)
        assert mask.sum() == pytest.approx(annotation["area"], rel=0.15)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        measured = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        # A long triangle's tip is thinner than a pixel.
        assert measured == pytest.approx([x, y, x + w, y + h], abs=3)


def test_objects_vary_and_stand_out():
    labels, aspects, sizes, contrasts = [], [], [], []
    for seed in range(60):
        image, objects = scenes.render_scene(np.random.default_rng(seed), 128, 128)
        assert 1 <= len(objects) <= 3
        colourfulness = np.ptp(image.astype(int), axis=2)
        for label, outline in objects:
            x, y, right, bottom = *outline.min(axis=0), *outline.max(axis=0)
            centre = colourfulness[int((y + bottom) / 2), int((x + right) / 2)]
            labels.append(label)
            aspects.append((right - x) / (bottom - y))
            sizes.append(max(right - x, bottom - y) / 128)
            contrasts.append(centre / np.median(colourfulness))
    assert set(labels) == set(range(len(scenes.SHAPE_CLASSES)))
    assert min(aspects) < 0.5 and max(aspects) > 2
    assert min(sizes) < 0.3 and max(sizes) > 0.75
    assert np.mean(np.array(contrasts) > 2) > 0.95


@pytest.mark.parametrize("standing", [False, True])
@pytest.mark.parametrize("lengths", [(72, 124), (20, 40)])
def test_a_bars_class_is_told_by_its_two_ends(standing, lengths):
    labels = set()
    for seed in range(60):
        image, objects = scenes.render_bars(np.random.default_rng(seed), lengths, standing)
        assert image.shape == (128, 128, 3) and 1 <= len(objects) <= 5
        for label, outline in objects:
            (x0, y0), (x1, y1) = outline.min(axis=0), outline.max(axis=0)
            long, short = (y1 - y0, x1 - x0) if standing else (x1 - x0, y1 - y0)
            assert lengths[0] <= long <= lengths[1] and 14 <= short <= 22
            first = (x0 + short / 2, y0 + 4) if standing else (x0 + 4, y0 + short / 2)
            last = (x0 + short / 2, y1 - 4) if standing else (x1 - 4, y0 + short / 2)
            ends = [int(image[int(y), int(x)].argmax()) for x, y in (first, last)]
            assert label == 3 * ends[0] + ends[1], scenes.BAR_CLASSES[label]
            labels.add(label)
    assert labels == set(range(9))


def test_is_made_once(monkeypatch):
    path = sets.ensure_embedded_dataset()
    monkeypatch.delattr(sets, "write_embedded_dataset")
    assert sets.ensure_embedded_dataset() == path


def test_a_killed_run_leaves_nothing_half_made(tmp_path, monkeypatch):
    final = tmp_path / "nats_embedded"

    def killed(folder, dataset):
        (Path(folder) / "train").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sets, "write_embedded_dataset", killed)
        with pytest.raises(KeyboardInterrupt):
            sets.ensure_embedded_dataset()
    assert not list(tmp_path.iterdir())
    sets.ensure_embedded_dataset()
    assert len(list((final / "train").iterdir())) == COUNTS["train"]
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("folder", SMALL)
def test_registered_names_load(tmp_path, folder):
    assert not (tmp_path / folder).exists()  # registering makes nothing
    classes = list(SMALL[folder].classes)
    for split, count in COUNTS.items():
        assert MetadataCatalog.get(f"{folder}_{split}").thing_classes == classes
        records = DatasetCatalog.get(f"{folder}_{split}")
        assert len(records) == count
        assert all(Path(record["file_name"]).is_file() for record in records)
        labels = {a["category_id"] for record in records for a in record["annotations"]}
        assert labels <= set(range(len(classes)))


def test_an_evaluator_may_come_before_the_data(tmp_path):
    evaluator = COCOEvaluator("nats_embedded_val", output_dir=str(tmp_path / "output"))
    assert len(evaluator._coco_api.imgs) == COUNTS["val"]


@pytest.fixture
def detector():
    """The quickstart's, with the embedded weights; and their name."""
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs/quickstart/base.yaml"), allow_unsafe=False)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model.eval(), cfg.MODEL.WEIGHTS


def test_weights_load_into_every_key_of_a_detectors_backbone(detector):
    model, name = detector
    saved = torch.load(PathManager.get_local_path(name))["model"]
    backbone = model.backbone.bottom_up.state_dict()
    assert set(saved) == set(backbone)
    for key, value in backbone.items():
        assert value.dtype in (torch.float32, torch.int64)
        assert torch.isfinite(value).all(), key  # a variance may be too large for half precision
        assert torch.equal(value, saved[key].to(value.dtype)), key
    assert sum(p.numel() for p in model.backbone.bottom_up.parameters()) < 1.6e6


def test_the_weights_tell_the_classes_apart_without_training(detector):
    # Features of one class lie closer to their own class's mean than to any other's.
    model, _ = detector
    images, labels = [], []
    for seed in range(96):
        image, objects = scenes.render_scene(np.random.default_rng([7, seed]), 64, 64, 1)
        images.append(torch.from_numpy(image[:, :, ::-1].transpose(2, 0, 1).copy()).float())
        labels.append(objects[0][0])
    labels = torch.tensor(labels)
    with torch.no_grad():
        normalized = (torch.stack(images) - model.pixel_mean) / model.pixel_std
        features = model.backbone.bottom_up(normalized)["res5"]
    features = features.mean(dim=(2, 3))
    means = torch.stack([features[:48][labels[:48] == c].mean(0) for c in range(5)])
    nearest = torch.cdist(features[48:], means).argmin(dim=1)
    assert (nearest == labels[48:]).float().mean() > 0.9


def test_unknown_names_are_refused():
    with pytest.raises(NATSError, match="Unknown name nats://resnet.pth"):
        PathManager.get_local_path("nats://resnet.pth")
