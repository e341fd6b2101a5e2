"""The pages of registers, and the weights for them, that the package ships."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from detectron2_nats.look.detector import Detector
from detectron2_nats.toy.catalog import REGISTERS, register_embedded_datasets

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/quickstart/registers.yaml")
COUNTS = {"train": (35, 245), "calibration": (16, 112), "val": (22, 154)}


@pytest.fixture(autouse=True)
def registered():
    register_embedded_datasets()


@pytest.mark.parametrize("split, counts", COUNTS.items())
def test_pages_are_read_in_place(tmp_path, monkeypatch, split, counts):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    records = DatasetCatalog.get(f"{REGISTERS}_{split}")
    assert (len(records), sum(len(r["annotations"]) for r in records)) == counts
    assert MetadataCatalog.get(f"{REGISTERS}_{split}").thing_classes == ["column"]
    for record in records:
        size = record["width"], record["height"]
        assert Image.open(record["file_name"]).size == size and min(size) == 192
        for annotation in record["annotations"]:
            x, y, w, h = annotation["bbox"]
            assert min(x, y) >= 0 and min(w, h) > 1 and x + w <= size[0] and y + h <= size[1]
    assert not list(tmp_path.iterdir())


def test_splits_share_neither_pages_nor_ids():
    folder = Path(PathManager.get_local_path(f"nats://{REGISTERS}"))
    pages = sorted(folder.glob("*/*.jpg"))
    assert len(pages) == len({path.read_bytes() for path in pages}) == 73
    assert len({path.name for path in pages}) == 73
    splits = [json.loads(path.read_text()) for path in folder.glob("instances_*.json")]
    for key, count in (("images", 73), ("annotations", 511)):
        assert len({entry["id"] for split in splits for entry in split[key]}) == count


def test_licences_lie_beside_what_they_are_of():
    folder = Path(PathManager.get_local_path(f"nats://{REGISTERS}"))
    licence = (folder / "LICENSE").read_text()
    for words in ("LECTAUREP", "Archives nationales", "Inria", "CC BY 4.0", "What was changed"):
        assert words in licence
    assert "Copyright 2016, Yahoo Inc." in (folder.parent / "half_r50_res3.LICENSE").read_text()


def test_the_weights_fill_the_backbone():
    assert Detector(CONFIG, "", []).untrained == []


def test_the_weights_are_those_of_the_whole_checkpoint_but_for_rounding():
    whole = ROOT.parent / "shared/weights/R-50-half.pkl"
    if not whole.is_file():
        pytest.skip("needs a checkpoint that is not in the repository")
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255 - 115
    with torch.no_grad():
        ours, theirs = (Detector(CONFIG, w, []).backbone(image)["res3"] for w in ("", str(whole)))
    assert (ours - theirs).norm() < 0.003 * theirs.norm()
    saved = torch.load(PathManager.get_local_path("nats://half_r50_res3.pth"))["model"]
    for name, value in pickle.loads(whole.read_bytes())["model"].items():
        if name in saved:
            expected = torch.from_numpy(value).to(saved[name].dtype)
            assert torch.equal(saved[name], expected), name
