"""tools/benchmark.py: each part on a tiny network, and the tables."""

import runpy
import sys
from pathlib import Path

import pytest
from runs import TINY

from detectron2_nats.config import load_config

SCRIPT = Path(__file__).resolve().parents[2] / "tools/benchmark.py"
FROZEN = ["frozen, paper order", "frozen, voted order"]


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """The script's functions. Its networks are tiny ones, and R50's name stands for them."""
    (tmp_path / "tiny.yaml").write_text(f"VERSION: 2\n{TINY}")
    names = runpy.run_path(str(SCRIPT))

    def load(args, kind, name):
        backbone = {"search": "build_nats_backbone", "retrain": "build_resnet_fpn_backbone"}[kind]
        return load_config(str(tmp_path / "tiny.yaml"), ["MODEL.BACKBONE.NAME", backbone])

    monkeypatch.setitem(names["configs"].__globals__, "load", load)
    return names


def cells(text):
    """The cells of each row of the tables in a text, without the lines under the headers."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "|:--" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_each_part_compares_its_variants_with_the_plain_one(benchmark, monkeypatch, capsys):
    words = ["--networks", "R50", "--size", "64", "90", "--rounds", "1", "--batch", "2"]
    words += ["--what", "inference", "train", "convs", "--dtype", "bfloat16"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    benchmark["main"](benchmark["parse"](words))
    text = capsys.readouterr().out
    assert "PyTorch" in text.splitlines()[0] and "--rounds 1" in text.splitlines()[0]
    assert "## convs: R50, bfloat16, 2 x 64 x 96" in text
    rows, plain = [row[0] for row in cells(text)], ["plain", *FROZEN]
    inference = [*plain, "super-network", *[f"{row}, fused" for row in plain]]
    train = [*plain, "plain, search config", "weight step", "α step", "both"]
    convs = [f"{s} {v}" for s in ("res3", "res4", "res5") for v in (*plain, *train[4:6])]
    assert rows == ["", *inference, "", *train, "", *convs]


def test_variants_are_compared_by_round(benchmark):
    step = {"plain": [1000.0, 2000.0, 4000.0], "other": [2000.0, 3000.0, 4000.0]}
    peak = {"plain": [1.0], "other": [1.25]}
    reference = {"plain": "plain", "other": "plain"}
    table = benchmark["table"]({"step, ms": step, "peak, MiB": peak}, reference)
    assert cells(table) == [
        ["", "step, ms", "ratio", "peak, MiB", "ratio"],
        ["plain", "2,000", "", "1", ""],
        ["other", "3,000", "1.50 (1.00..2.00)", "1.25", "1.25"],
    ]
