"""tools/benchmark.py: each part on a tiny network, the counter of kept bytes, the tables."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from runs import TINY
from torch import nn

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


def test_memory_and_the_steps(benchmark):
    """What a training keeps grows with its images; of two steps the larger counts."""
    memory_of = benchmark["memory_of"]
    args = benchmark["parse"](["--size", "64", "96", "--batch", "2"])
    variants = ("plain", "weight step", "α step", "both")
    kept, peaks = zip(*(memory_of(args, "R50", "float32", v) for v in variants))
    assert kept[3] == pytest.approx(max(kept[1:3]), rel=0.05)
    assert all(peak > saved > 0 for peak, saved in zip(peaks, kept))
    args.batch = 4
    assert memory_of(args, "R50", "float32", "plain")[0] > 1.5 * kept[0]
    training = benchmark["Training"](args, "R50", "float32", "both")
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    for step in training.steps:
        step()
    assert all(map(torch.equal, before, training.model.parameters()))


class _Steps(nn.Module):
    """Keeps x once for two uses, and exp's result; not its own weight and buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10))
        self.register_buffer("scale", torch.randn(10))

    def forward(self, x):
        return (x * self.weight).exp() + x[:5].repeat(2) * self.scale + x.view(2, 5).pow(2).sum()


def test_saved_bytes(benchmark):
    model, x = _Steps(), torch.randn(10, requires_grad=True)

    def step():
        torch.autograd.grad(model(x).sum(), [x, model.weight])

    # x and exp(x·weight), ten float32 each
    assert benchmark["saved_bytes"](step, model) == 2 * 10 * 4
    with torch.no_grad():
        assert benchmark["saved_bytes"](lambda: model(x), model) == 0


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
