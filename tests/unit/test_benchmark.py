"""tools/benchmark.py: the other forms of the search conv, the counter of kept bytes, the tables."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from runs import run
from torch import nn

from detectron2_nats import GroupedDilationConv2d, MixedDilationConv2d
from detectron2_nats.results.cost import interleaved_seconds
from detectron2_nats.search_space import PAPER_SETS

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"
_spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)


def mixed_conv(stage, groups=1, stride=1):
    """A double conv with replicas and α that all differ."""
    torch.manual_seed(3)
    conv = nn.Conv2d(8, 16, 3, stride=stride, padding=1, groups=groups, bias=False).double()
    mixed = MixedDilationConv2d(conv, genotypes=PAPER_SETS["C"][stage], num_groups=4)
    for parameter in mixed.parameters():
        nn.init.normal_(parameter)
    return mixed


def value_and_gradients(conv, x):
    """Output, and a random projection's gradients to the input, α and all weights (G, …)."""
    x = x.clone().requires_grad_(True)
    y = conv(x)
    generator = torch.Generator().manual_seed(5)
    projection = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    parameters = dict(conv.named_parameters())
    found = torch.autograd.grad((y * projection).sum(), [x, *parameters.values()])
    gradients = dict(zip(["x", *parameters], found))
    alpha, x_gradient = gradients.pop("alpha"), gradients.pop("x")
    weights = [g if g.dim() == 5 else g[None] for g in gradients.values()]
    return y, x_gradient, alpha, torch.cat(weights)


@pytest.mark.parametrize("form", [benchmark.TextbookMixture, benchmark.MergedKernel])
@pytest.mark.parametrize("stage, groups, stride", [("res3", 1, 1), ("res5", 1, 2), ("res5", 4, 1)])
def test_rivals_equal_ours(form, stage, groups, stride):
    ours = mixed_conv(stage, groups, stride)
    x = torch.randn(2, 8, 13, 12, dtype=torch.float64)
    expected, actual = value_and_gradients(ours, x), value_and_gradients(form(ours), x)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b)


def test_a_conv_each_equals_the_frozen_conv():
    conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
    frozen = GroupedDilationConv2d(conv, [(9, 1, 1), (1, 2, 4), (6, 3, 1)])
    each = benchmark.ConvEach(frozen)
    x = torch.randn(2, 8, 13, 12)
    torch.testing.assert_close(each(x), frozen(x))
    assert sum(p.numel() for p in each.parameters()) == conv.weight.numel()


def test_merged_kernel_is_as_large_as_its_largest_dilation():
    assert benchmark.MergedKernel(mixed_conv("res3")).padding == (3, 3)
    assert benchmark.MergedKernel(mixed_conv("res5")).padding == (5, 5)


def test_rf_next_mixes_three_dilations():
    pytest.importorskip("mmcv.cnn.rfsearch")
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    op = benchmark.rf_next_conv(conv)
    assert op.dilation_rates == [(1, 1), (2, 2), (3, 3)]
    x = torch.randn(1, 4, 9, 9)
    each = [nn.functional.conv2d(x, conv.weight, None, 1, d, d) for d in (1, 2, 3)]
    torch.testing.assert_close(op(x), sum(each) / 3)
    assert conv.dilation == (1, 1)


def test_days_of_the_papers_search():
    """A day of weight steps at 25 epochs of 82,783 images, half a day of α steps at 15."""
    images = 82_783
    day = benchmark.search_days(86400 / (25 * images), 0)
    assert day == pytest.approx(1)
    assert benchmark.search_days(0, 43200 / (15 * images)) == pytest.approx(0.5)


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


def test_short_functions_are_repeated():
    calls = []
    args = benchmark.parse(["--rounds", "2"])
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = benchmark.measure(args, functions)
    assert "".join(calls) == "ab" * 3 and {k: len(v) for k, v in seconds.items()} == dict(a=2, b=2)
    calls.clear()
    benchmark.measure(args, functions, least=1e-3)
    assert calls.count("b") > 3 and (calls.count("a") - 2) == calls.count("b")


def test_interleaved_on_the_cpu_by_name():
    assert [len(v) for v in interleaved_seconds([int, int], 3, device="cpu")] == [3, 3]


def test_table():
    args = benchmark.parse(["--batch", "4"])
    seconds = {"plain": [1.0, 2.0, 4.0], "other": [2.0, 3.0, 4.0]}
    reference = {"plain": "plain", "other": "plain", "absent": "plain"}
    table = benchmark.timing_table(args, {"step": seconds}, reference, images=True).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["", "step, ms", "images/s", "step, ratio"]
    assert cells[2] == ["plain", "2,000", "2", ""]
    assert cells[3] == ["other", "3,000", "1.33", "1.50 (1.00..2.00)"]
    assert cells[4] == ["absent", "", "", ""]
    args.smoke = True
    assert "ms" not in benchmark.timing_table(args, {"step": seconds}, reference)


def test_architectures_share_their_votes():
    args = benchmark.parse([])
    paper, voted = benchmark.architectures(args, "X101").values()
    assert paper.layers != voted.layers and len(paper.layers) == 4 + 23 + 3
    for layer in paper.layers:
        assert paper.channels_per_dilation(layer) == voted.channels_per_dilation(layer)


def test_help_and_errors(tmp_path):
    output = run("tools/benchmark.py", "--help")
    assert "examples:" in output and "--measure-memory" not in output
    small = ("--networks", "R50", "--size", "64", "64", "--rounds", "1")
    output = run("tools/benchmark.py", "--ic-conv", str(tmp_path / "no.json"), *small, status=2)
    assert re.search(r"^error: .*no\.json", output, re.M) and "Traceback" not in output


def test_end_to_end(tmp_path):
    path = tmp_path / "tables.md"
    output = run(
        *("tools/benchmark.py", "--what", "convs", "--networks", "R50", "--size", "64", "64"),
        *("--rounds", "1", "--output", str(path)),
    )
    text = path.read_text()
    assert text.strip() in output
    head, *table = text.strip().splitlines()
    assert "PyTorch" in head and "--what convs" in head
    rows = [line.split("|")[1].strip() for line in table if line.startswith("| res")]
    variants = ("plain", "frozen, paper order", "frozen, voted order")
    assert rows == [f"{stage} {v}" for stage in ("res3", "res4", "res5") for v in variants]


def test_all_reduced_bytes():
    dist = torch.distributed

    def step():
        dist.all_reduce(torch.zeros(3))
        dist.all_reduce(torch.zeros(4))

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = benchmark.DistributedDataParallel(nn.Linear(5, 2))
        wrapped.register_comm_hook(None, benchmark.allreduce_hook)
        backward = lambda: wrapped(torch.ones(1, 5)).sum().backward()  # noqa: E731
        assert benchmark.all_reduced_bytes(backward) == (5 * 2 + 2) * 4
        plain = dist.all_reduce
        assert benchmark.all_reduced_bytes(step) == 7 * 4 and dist.all_reduce is plain
    finally:
        dist.destroy_process_group()


def test_ranks_table(monkeypatch):
    def on_ranks(args, name, dtype, world):
        seconds = {variant: [2.0, 2.0 * world, 9.0] for variant in benchmark.SEARCH_VARIANTS[:3]}
        return {"seconds": seconds, "bytes": dict.fromkeys(seconds, 3 * 2**20)}

    monkeypatch.setattr(benchmark, "_on_ranks", on_ranks)
    report = benchmark.Report("")
    benchmark.run_ranks(benchmark.parse(["--batch", "4"]), report, "R50", "float32")
    row = next(line for line in report.text.splitlines() if line.startswith("| weight step"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["weight step", "2", "2", "50%", "3"]
