"""What the README tells a user to do works as written."""

import re
from pathlib import Path

from oracles import has_dilations

from detectron2_nats import Architecture
from detectron2_nats.config import load_config
from detectron2_nats.method.stages import conv3x3_layers
from detectron2_nats.search.export import export_config, write_config

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text()
CONFIGS = (REPOSITORY / "configs/README.md").read_text()


def test_five_lines_in_another_project(tmp_path, monkeypatch):
    base = load_config(str(REPOSITORY / "configs/quickstart/base.yaml"))
    base.MODEL.DEVICE = "cpu"
    layers = {
        f"res5.{i}.conv2": [[64, 1, 1], [64, 3, 3]] for i in range(3)
    }  # res5 of width 16 has 128 channels
    write_config(export_config(base, Architecture(layers)), str(tmp_path / "retrain.yaml"))
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(code, names)
    convs = conv3x3_layers(names["model"].backbone)
    assert [k for k, v in convs.items() if has_dilations(v)] == list(layers)


def test_every_file_it_names_is_there():
    for path in re.findall(r"\]\(((?:projects|docs|LICENSE)[^)#]*)", README):
        assert (REPOSITORY / path).exists(), path
    for kind, name in re.findall(r"`(search|retrain)/(\w+)`", CONFIGS):
        assert (REPOSITORY / "configs" / kind / f"{name}.yaml").exists(), name


def test_the_papers_numbers_are_called_the_papers():
    rows = [line for line in CONFIGS.splitlines() if line.startswith("| `search/faster")]
    assert len(rows) == 6
    for page in (README, CONFIGS):
        assert "have **not** been measured here" in " ".join(page.split())
