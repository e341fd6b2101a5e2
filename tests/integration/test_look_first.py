"""nats-look on drawn bars and real photographs."""

import json
import re
from pathlib import Path

import pytest
from calls import call

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "bars, verdict, following",
    [
        (
            "lying",
            r"Elongated: half of the objects are \d\d px wide",
            "nats-draw %s --uniform 1x5 ",
        ),
        (
            "standing",
            r"Elongated: half of the objects are \d\d px tall",
            "nats-draw %s --uniform 5x1 ",
        ),
        ("short", "Seen whole: ", "train the plain detector, nats-train %s"),
    ],
)
def test_bars(tmp_path, monkeypatch, bars, verdict, following):
    monkeypatch.chdir(ROOT)
    config = "configs/quickstart/bars.yaml"
    data = ["DATASETS.TEST", f"('nats_bars_{bars}_val',)", "MODEL.DEVICE", "cpu"]
    printed = call("nats-look", config, "nats://embedded_r50.pth", "--output", tmp_path, *data)
    height, width = re.search(r"\nres3 +(\d+) +(\d+)\n", printed).groups()
    assert 37 <= int(height) <= 45 and 37 <= int(width) <= 45  # a few images decide on the rest
    assert re.search(rf"\n{verdict}", printed)
    assert f"\nnext: {following % f'--config-file {config}'}" in printed
    assert (tmp_path / "look.png").is_file()


@pytest.mark.parametrize(
    "config, verdict",
    [
        ("configs/examples/own_data_retrain.yaml", "Seen whole: "),
        ("study/configs/cut_res2.yaml", "Between: "),
    ],
)
def test_blood_cells(monkeypatch, config, verdict):
    data, weights = ROOT.parent / "shared/data/bccd", ROOT.parent / "shared/weights/R-50-half.pkl"
    if not data.is_dir() or not weights.is_file():
        pytest.skip("needs photographs that are not in the repository")
    monkeypatch.chdir(ROOT)
    words = ["nats-look", config, weights, "--images", data / "images", "MODEL.DEVICE", "cpu"]
    annotations = data / "annotations/instances_val.json"
    assert f"\n{verdict}" in call(*words, "--annotations", annotations)


def test_boxes_in_other_units_are_refused(tmp_path):
    """They would give another verdict."""
    image = {"id": 1, "file_name": "1.png", "width": 40, "height": 30}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [25, 12, 39, 29]}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    words = ["nats-look", "--network", "torchvision:resnet18", "--images", tmp_path]
    assert "box leaves its image" in call(*words, "--annotations", tmp_path / "a.json", status=2)
