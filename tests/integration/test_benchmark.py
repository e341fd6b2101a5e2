"""tools/benchmark.py: each part on a tiny network, the counter of kept bytes, the tables."""

import importlib.util
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from runs import TINY, run
from torch import nn

from detectron2_nats.config import load_config
from detectron2_nats.data.registry import check_number_of_classes
from detectron2_nats.show.cost import interleaved_seconds

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"
_spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)

FROZEN = ["frozen, paper order", "frozen, voted order"]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The networks are tiny ones, and R50's name stands for them."""
    path = tmp_path / "tiny.yaml"
    path.write_text(f"VERSION: 2\n{TINY}")

    def load(args, kind, name, dtype="float32"):
        backbone = {"search": "build_nats_backbone", "retrain": "build_resnet_fpn_backbone"}[kind]
        amp = ["SOLVER.AMP.ENABLED", dtype != "float32", "SOLVER.AMP.PRECISION", "bfloat16"]
        return load_config(str(path), ["MODEL.BACKBONE.NAME", backbone, *amp])

    monkeypatch.setattr(benchmark, "load", load)


def rows_of(table: str):
    """First cells of a Markdown table's rows."""
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    return rows[2:]


def arguments(*more: str):
    return benchmark.parse(["--size", "64", "96", "--rounds", "1", "--batch", "2", *more])


@pytest.mark.parametrize("more", [(), ("--channels-last",)])
def test_inference(tiny, more):
    table = benchmark.run_inference(arguments(*more), "R50", "bfloat16")
    plain = ["plain", *FROZEN]
    assert rows_of(table) == [*plain, "super-network", *[f"{row}, fused" for row in plain]]
    assert table.splitlines()[0].split("|")[2].strip() == "backbone, ms"
    assert table.splitlines()[0].split("|")[4].strip() == "detector, ms"


@pytest.mark.parametrize("dtype, more", [("float32", ()), ("bfloat16", ("--channels-last",))])
def test_train(tiny, dtype, more):
    table = benchmark.run_train(arguments(*more), "R50", dtype)
    search = ["plain, search config", "weight step", "α step", "weight + α step"]
    assert rows_of(table) == ["plain", *FROZEN, *search]
    smoke = benchmark.run_train(arguments("--smoke", *more), "R50", dtype)
    assert rows_of(smoke) == search


@pytest.mark.parametrize("kind", ["retrain", "search"])
def test_the_real_configs_fit_the_data(kind):
    """A trainer refuses a model of other classes than its data."""
    cfg = benchmark.load(arguments(), kind, "R50")
    check_number_of_classes(cfg, "nats_embedded_train", 5)


def test_timm(monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setattr(benchmark, "TIMM", {"mobilenetv3_small_050": "blocks.*"})
    table = benchmark.run_timm(arguments(), "mobilenetv3_small_050", "float32")
    assert rows_of(table)[:2] == ["plain", "frozen, 7 dilations"] and len(rows_of(table)) == 5


def test_convs(tiny):
    table = benchmark.run_convs(arguments(), "R50", "float32")
    variants = ["plain", *FROZEN, "weight step", "α step"]
    assert rows_of(table) == [f"{s} {v}" for s in ("res3", "res4", "res5") for v in variants]


def test_each_conv_trains_what_its_step_does(tiny):
    convs = benchmark.convs_of(arguments(), "R50", "res4")
    trained = {
        variant: [name for name, p in conv.named_parameters() if p.requires_grad]
        for variant, conv in convs.items()
    }
    assert trained["plain"] == trained["frozen, paper order"] == ["weight"]
    assert sorted(trained["weight step"]) == ["replicas", "weight"]
    assert trained["α step"] == ["alpha"]


def test_memory(tiny):
    """What a training keeps grows with its images; of two steps the larger counts."""
    args = arguments()
    variants = ("plain", "weight step", "α step", "weight + α step")
    kept, peaks = zip(*(benchmark.memory_of(args, "R50", "float32", v) for v in variants))
    assert kept[3] == pytest.approx(max(kept[1:3]), rel=0.05)
    assert all(peak > saved > 0 for peak, saved in zip(peaks, kept))
    args.batch = 4
    assert benchmark.memory_of(args, "R50", "float32", variants[0])[0] > 1.5 * kept[0]


def test_memory_table(tiny, monkeypatch):
    def memory_of(args, name, dtype, variant):
        return (3 if variant == "α step" else 2) * 2**20, 2**30

    monkeypatch.setattr(benchmark, "memory_of", memory_of)
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")
    table = benchmark.run_memory(arguments("--smoke"), "R50", "float32")
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    assert cells[0] == ["", "kept for backward, MiB", "ratio", "peak, MiB", "ratio"]
    assert cells[2] == ["plain, search config", "2", "", "1,024", ""]
    assert cells[4] == ["α step", "3", "1.50", "1,024", "1.00"]


def test_steps_change_no_weight(tiny):
    for variant in ("plain", "weight + α step"):
        steps = benchmark.training_steps(arguments(), "R50", "float32", variant)
        model = steps[0].__self__.model
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for step in steps * 2:
            benchmark.take(step)
        assert all(map(torch.equal, before, model.parameters()))


def test_numbers_that_are_not_finite_are_not_timed(tiny):
    (step,) = benchmark.training_steps(arguments(), "R50", "float32", "plain")
    next(step.__self__.model.backbone.parameters()).data.fill_(float("nan"))
    with pytest.raises(benchmark.NATSError, match="not finite"):
        benchmark.take(step)


def test_channels_last_is_a_layout_only():
    args, conv = benchmark.parse(["--channels-last"]), nn.Conv2d(4, 6, 3)
    before = conv.weight.detach().clone()
    conv.replicas = nn.Parameter(torch.stack([before, before]))
    benchmark.prepared(args, conv)
    for weight in (conv.weight, *conv.replicas):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous() and torch.equal(weight, before)
    benchmark.prepared(benchmark.parse([]), plain := nn.Conv2d(4, 6, 3))
    assert plain.weight.is_contiguous()


class _Steps(nn.Module):
    """Keeps x once for two uses, and exp's result; not its own weight and buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10))
        self.register_buffer("scale", torch.randn(10))

    def forward(self, x):
        return (x * self.weight).exp() + x[:5].repeat(2) * self.scale + x.view(2, 5).pow(2).sum()


def test_saved_bytes():
    model, x = _Steps(), torch.randn(10, requires_grad=True)
    gradients = []

    def step():
        gradients.append(torch.autograd.grad(model(x).sum(), [x, model.weight]))

    # x and exp(x·weight), ten float32 each
    assert benchmark.saved_bytes(step, model) == 2 * 10 * 4
    step()
    for counted, plain in zip(*gradients):
        assert torch.equal(counted, plain)
    with torch.no_grad():
        assert benchmark.saved_bytes(lambda: model(x), model) == 0


def test_variants_are_measured_in_turn():
    calls = []
    args = benchmark.parse(["--rounds", "2"])
    values = benchmark.measure(args, calls.append, {"first": "a", "second": "b"})
    assert "".join(calls) == "ab" * 3
    assert {k: len(v) for k, v in values.items()} == dict(first=2, second=2)
    calls.clear()
    benchmark.measure(args, calls.append, {"first": "a", "second": "b"}, repeats=3)
    assert "".join(calls) == "aaabbb" * 3


def test_interleaved_on_the_cpu_by_name():
    assert [len(v) for v in interleaved_seconds([int, int], 3, device="cpu")] == [3, 3]


def test_table():
    reference = {"plain": "plain", "other": "plain"}
    step = {"plain": [1000.0, 2000.0, 4000.0], "other": [2000.0, 3000.0, 4000.0]}
    peak = {"plain": [1.0], "other": [1.25]}
    table = benchmark.table({"step, ms": step, "peak, MiB": peak}, reference).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["", "step, ms", "ratio", "peak, MiB", "ratio"]
    assert cells[2] == ["plain", "2,000", "", "1", ""]
    assert cells[3] == ["other", "3,000", "1.50 (1.00..2.00)", "1.25", "1.25"]


def test_architectures_share_their_votes():
    args = benchmark.parse([])
    paper, voted = benchmark.architectures(args, "X101").values()
    assert paper.layers != voted.layers and len(paper.layers) == 4 + 23 + 3
    for layer in paper.layers:
        assert paper.channels_per_dilation(layer) == voted.channels_per_dilation(layer)


def test_sizes_are_whole_strides():
    assert benchmark.parse(["--size", "800", "1200"]).size == [800, 1216]


def test_errors(tmp_path):
    small = ("--networks", "R50", "--size", "64", "64", "--rounds", "1")
    output = run("tools/benchmark.py", "--ic-conv", str(tmp_path / "no.json"), *small, status=2)
    assert re.search(r"^error: .*no\.json", output, re.M) and "Traceback" not in output


def test_end_to_end(tiny, tmp_path, capsys, monkeypatch):
    path = tmp_path / "tables.md"
    words = ["--what", "convs", "--networks", "R50", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    benchmark.main(arguments(*words))
    text = path.read_text()
    assert capsys.readouterr().out == f"{text}wrote {path}\n"
    assert "PyTorch" in text.splitlines()[0] and "--what convs" in text.splitlines()[0]
    assert re.findall(r"^## (.*)", text, re.M) == ["convs: R50, float32, 2 x 64 x 96"]


def test_a_file_that_cannot_be_written_is_named(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setitem(benchmark.RUNS, "convs", lambda *_: "")
    path = str(tmp_path / "file" / "tables.md")
    with pytest.raises(benchmark.NATSError, match="tables.md: cannot be written"):
        benchmark.main(arguments("--what", "convs", "--networks", "R50", "--output", path))
