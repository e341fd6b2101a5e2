"""The tools as a user starts them: good runs name what they wrote, bad input is one line.

What has no need of a process of its own runs in this one, which spares the imports.
"""

import argparse
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from runs import REPOSITORY, TINY, Warm

from detectron2.modeling import build_model
from detectron2_nats import Architecture
from detectron2_nats.bench.study.methods import seeds_argument
from detectron2_nats.commands import cli
from detectron2_nats.config import load_config
from detectron2_nats.method.names import searched_layers


def file_of(name: str) -> str:
    """Of a command, or of a script of the repository."""
    is_command = name.startswith("nats-")
    return str(Path(sys.executable).with_name(name) if is_command else REPOSITORY / name)


def tool(name: str, *arguments, folder=REPOSITORY) -> subprocess.CompletedProcess:
    words = [file_of(name), *map(str, arguments)]
    process = Warm(words, folder, dict(os.environ), separate=True)
    status = process.wait(timeout=240)
    printed = (Path(file.name).read_text() for file in (process.log, process.errors))
    return subprocess.CompletedProcess(words, status, *printed)


def tool_here(monkeypatch, folder: Path, name: str, *arguments: str):
    """The same in this process; returns what it left with: None, a status or a last line."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if name.startswith("nats-"):
                cli.main()
            else:
                runpy.run_path(file_of(name), run_name="__main__")
        except SystemExit as left:
            return left.code


def results(dilation, methods=("plain", "random", "nats-voted", "nats-warm")) -> dict:
    """Those of a study of one seed whose search gave most channels `dilation`."""
    architecture = [["res3.0.conv2", [[8, 1, 1], [92, *dilation]]]]
    numbers = {"parameters": 97632, "flops": 56_700_000, "milliseconds": 1.5, "time_ratio": 1.1}
    method = {"AP": [31.5], "AP50": [42.0], "AP75": [33.0], "cpu_seconds": [60.0], **numbers}
    method |= {"pooled": None, "architectures": [architecture]}
    method |= {"classes": {"red_blue": [30.0], "blue_red": [33.0]}}
    search = {"entropy": [0.4], "leading": [1.0], "cpu_seconds": [70.0]}
    searches = {"nats": {**search, "architectures": [architecture]}}
    return {"seeds": [0], "methods": {name: method for name in methods}, "searches": searches}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With `search`, a search's output folder, and files that are damaged or in the way."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "search").mkdir()
    (folder / "tiny.yaml").write_text(f"VERSION: 2\n{TINY}")
    cfg = load_config(str(folder / "tiny.yaml"))
    torch.manual_seed(0)
    model = build_model(cfg)
    for conv in searched_layers(model).values():
        torch.nn.init.normal_(conv.alpha)
    search = {"order": "paper", "iteration": 6}
    Architecture.decode(model, **search).save(f"{folder}/search/architecture.yaml")
    (folder / "search/config.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, folder / "search/model_final.pth")
    backbone = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    torch.save({"model": backbone}, folder / "classifier.pth")
    (folder / "search/last_checkpoint").write_text("model_final.pth")
    values = {"alpha/entropy": 0.9, "alpha/votes_changed": 3, "intensity/res3.0.conv2/1x1": 1.0}
    (folder / "search/metrics.json").write_text(json.dumps({"iteration": 5, **values}) + "\n")

    (folder / "results.json").write_text(json.dumps(results((1, 3))))

    (folder / "damaged").mkdir()
    for name in ("architecture.yaml", "config.yaml", "last_checkpoint"):
        (folder / "damaged" / name).write_text((folder / "search" / name).read_text())
    (folder / "damaged/model_final.pth").write_text("no checkpoint")
    (folder / "a_file").write_text("nothing of use")
    pattern = [{"(0, 0)": 48 * 2**s, "(1, 2)": 16 * 2**s} for s in (0, 1, 2, 3)]
    blocks = [p for p, count in zip(pattern, (3, 4, 6, 3)) for _ in range(count)]
    (folder / "ic_conv.json").write_text(json.dumps(blocks))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        *("nats-analyze", "nats-export", "nats-import", "nats-plot", "nats-report", "nats-score"),
        *("nats-search", "nats-study", "nats-train"),
        *("tools/make_val35k.py", "tools/pretrain_embedded.py"),
    ],
)
def test_help(monkeypatch, capsys, name):
    assert tool_here(monkeypatch, REPOSITORY, name, "--help") == 0
    shown = capsys.readouterr().out
    example = f"$ {name}" if name.startswith("nats-") else f"python {name}"
    assert "usage: " in shown and "example" in shown and example in shown


@pytest.mark.parametrize(
    "name, arguments, written",
    [
        ("plot", "search --output p --format both", "p/architecture.png p/history.svg"),
        ("plot", "search/architecture.yaml --output q", "q/architecture.png"),
        ("import", "ic_conv.json --output ic.yaml --stages res5", "ic.yaml"),
        ("export", "search --order voted --weights w.pth --output voted.yaml", "w.pth voted.yaml"),
    ],
)
def test_good_run(folder, name, arguments, written):
    done = tool(f"nats-{name}", *arguments.split(), folder=folder)
    assert done.returncode == 0, done.stderr
    named = [line.removeprefix("wrote ") for line in done.stdout.splitlines()]
    assert set(written.split()) <= set(named), done.stdout
    assert named[-1] == written.split()[-1]
    assert all((folder / path).stat().st_size for path in named)


def test_a_margin_keeps_more_channels_plain(monkeypatch, folder):
    plain = []
    for margin in ("0", "0.1", "0.99"):
        arguments = ["search", "--margin", margin, "--output", "margin.yaml"]
        assert tool_here(monkeypatch, folder, "nats-export", *arguments) is None
        found = Architecture.from_config(load_config("margin.yaml").MODEL.NATS.ARCHITECTURE)
        plain.append(found.shares()[1, 1])
    assert plain[0] < plain[1] < plain[2] == 1


def test_a_studys_tables_from_its_results_alone(monkeypatch, capsys, folder):
    arguments = ["--again", "results.json", "--output", "again"]
    assert tool_here(monkeypatch, folder, "nats-study", *arguments) is None
    shown = capsys.readouterr().out
    assert "| nats-warm  | 31.5 |" in shown and "1×3 92%, 1×1 8%" in shown
    assert re.search(r"\| nats-warm +\| +30\.0 \| +33\.0 \|", shown)  # AP of each class
    assert (folder / "again/study.md").read_text() in shown
    assert (folder / "again/study.png").stat().st_size > 1000
    assert json.loads((folder / "again/results.json").read_text()) == results((1, 3))
    (folder / "odd.json").write_text('{"methods": 3}')
    left = tool_here(monkeypatch, folder, "nats-study", "--again", "odd.json")
    assert left == 2 and "odd.json: not the results of a study" in capsys.readouterr().err
    (folder / "new.json").write_text('{"methods": {}, "searches": {}, "seeds": [0]}')
    left = tool_here(monkeypatch, folder, "nats-study", "--again", "new.json")
    assert left == 2 and "new.json: contains no results yet" in capsys.readouterr().err


def test_a_study_that_several_machines_ran(monkeypatch, capsys, tmp_path):
    def part(name, seeds, methods):
        def repeated(values):
            if isinstance(values, dict):
                return {key: repeated(value) for key, value in values.items()}
            return values * len(seeds) if isinstance(values, list) else values

        content = {**repeated(results((1, 3), methods)), "seeds": seeds}
        for method in content["methods"].values():
            method["AP"] = [10.0 * seed for seed in seeds]
        (tmp_path / name).write_text(json.dumps(content))

    part("two.json", [0, 1], ("plain", "nats-warm"))
    part("one.json", [3], ("plain", "nats-warm", "random"))
    part("late.json", [1, 0], ("random",))
    part("far.json", [5], ("random",))
    files = ["two.json", "one.json", "late.json"]
    assert tool_here(monkeypatch, tmp_path, "nats-study", "--again", *files) is None
    shown = capsys.readouterr().out
    assert "3 seeds" in shown and "seed 3" in shown
    assert not (tmp_path / "output/study").exists()  # where studies are by default
    written = json.loads((tmp_path / "output/again/results.json").read_text())
    assert written["seeds"] == [0, 1, 3] and list(written["methods"])[2] == "random"
    # in late.json random's time was compared with itself
    assert [m["time_ratio"] for m in written["methods"].values()] == [1.1, 1.1, 1.1]
    part("other.json", [0, 1], ("random", "5x5"))
    files = ["two.json", "other.json"]
    assert tool_here(monkeypatch, tmp_path, "nats-study", "--again", *files) is None
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert ["1.100×" in row for row in rows[1:5]] == [True, True, False, False]
    for method in written["methods"].values():
        assert method["AP"] == [0, 10, 30]
        assert len(method["classes"]["red_blue"]) == len(method["architectures"]) == 3
    assert written["searches"]["nats"]["entropy"] == [0.4] * 3
    for files, words in (
        (
            ["two.json", "late.json", "two.json"],
            "two.json: plain of seed 0 is in another file, too",
        ),
        (["two.json", "far.json"], "no seed has results of all methods"),
    ):
        assert tool_here(monkeypatch, tmp_path, "nats-study", "--again", *files) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("text, seeds", [("3", [0, 1, 2]), ("2-3", [2, 3]), ("7-7", [7])])
def test_seeds_of_a_study(text, seeds):
    assert list(seeds_argument(text)) == seeds


@pytest.mark.parametrize("text", ["0", "3-2", "-1", "1-", "x", "1-2-3"])
def test_no_seeds_of_a_study(text):
    with pytest.raises(argparse.ArgumentTypeError, match="a range like 2-3"):
        seeds_argument(text)


@pytest.fixture(scope="module")
def demo():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runpy.run_path(str(REPOSITORY / "tools/demo.py"))


def test_the_demo_says_whether_the_search_was_right(demo):
    sentence = demo["EXAMPLES"]["bars"].sentence
    assert "92% of res3's channels" in sentence(results((1, 3)))
    assert "That is right" in sentence(results((1, 3)))
    assert "That is wrong" in sentence(results((3, 1)))


def test_the_demo_says_whether_the_search_found_the_direction_and_what_a_draw_gave(demo):
    example = demo["EXAMPLES"]["registers"]
    content = results((5, 1), example.methods)
    content["methods"]["random-2.2x"] = {"AP": [33.0]}
    said = example.sentence(content)
    assert "92% of res3's channels see far along the height and 0% along the width" in said
    assert "it has found that columns are tall" in said and "1.5 AP behind the best draw" in said
    content["methods"]["nats-warm"] = {"AP": [34.0]}
    assert "1.0 AP ahead of the best draw" in example.sentence(content)
    for dilation in ((1, 5), (5, 5), (1, 1)):
        assert "has not found" in example.sentence(results(dilation, example.methods))


@pytest.mark.parametrize("name", ["registers", "bars"])
def test_the_demos_table(demo, name):
    example = demo["EXAMPLES"][name]
    fields = dict.fromkeys(example.methods, "41 × 43")
    lines = demo["table"](example, results((1, 3), example.methods), fields).splitlines()
    assert len(lines) == 2 + 4 and "AP50" in lines[0]
    assert "31.5" in lines[2] and "41 × 43" in lines[5]


def test_analyze(folder):
    done = tool("nats-analyze", "search", "--size", "64", "100", folder=folder)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("res") for line in lines) == 13
    assert "one image of 64 x 128 pixels" in done.stdout
    assert [line.split()[-1] for line in lines[-3:]] == ["equal"] * 3


@pytest.mark.parametrize(
    "name, arguments, error",
    [
        ("plot", "nowhere", "nowhere: cannot be read: No such file or directory"),
        ("plot", "search --output a_file", "a_file: cannot be written"),
        ("plot", "search --searched tiny.yaml a_file", "is drawn beside --plain: give both"),
        ("plot", "search --plain tiny.yaml a_file", "is drawn beside --plain: give both"),
        (
            "plot",
            "--plain tiny.yaml classifier.pth --searched tiny.yaml classifier.pth",
            "weights are missing",
        ),
        ("plot", "", "give a search's output folder, an architecture file, or two detectors"),
        ("analyze", "ic_conv.json", "not an architecture file"),
        ("analyze", "search --config-file none.yaml", "config none.yaml not found"),
        ("import", "a_file --output x.yaml", "a_file: not readable as JSON"),
        ("import", "ic_conv.json --output a_file/x", "a_file/x: cannot be written"),
        ("export", "a_file", "a_file: not an architecture file"),
        ("export", "none.yaml", "none.yaml: cannot be read"),
        ("export", "search --output a_file/x.yaml", "a_file/x.yaml: cannot be written"),
        ("export", "search --weights w.pth", "fit only an architecture in voted order"),
        ("export", "damaged --order voted", "no checkpoint in damaged is intact"),
        ("score", "nowhere", "nowhere is not a search's output folder"),
        ("score", "search/architecture.yaml", "is not a search's output folder"),
        ("export", "search --margin 1.5", "DECODE_MARGIN 1.5: expected a share"),
    ],
)
def test_bad_input(monkeypatch, capsys, folder, name, arguments, error):
    assert tool_here(monkeypatch, folder, f"nats-{name}", *arguments.split()) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and error in line
    assert "wrote" not in captured.out


@pytest.mark.parametrize("name", ["analyze", "export", "import", "plot"])
def test_error_is_one_line_on_stderr(folder, name):
    more = ["--output", "x.yaml"] if name == "import" else []
    done = tool(f"nats-{name}", "nowhere", *more, folder=folder)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: nowhere: cannot be read")


@pytest.mark.parametrize(
    "name, arguments, error",
    [
        ("nats-plot", "search --images 0", "'0': expected a whole number from 1 to 4096"),
        ("nats-study", "--methods nats-best", "'nats-best': expected one of plain, plain-long"),
        ("nats-study", "--methods random@0.1", "'random@0.1': expected one of"),
        ("nats-study", "--methods path-warm@2", "'path-warm@2': expected one of"),
        ("nats-study", "--methods nats-warm@0.1", "--config-file and --search-config are needed"),
        ("tools/pretrain_embedded.py", "--steps 0", "--steps 0: expected at least 1"),
        (
            "tools/pretrain_embedded.py",
            "--output nowhere/x.pth",
            "the folder nowhere does not exist",
        ),
    ],
)
def test_bad_options(monkeypatch, capsys, folder, name, arguments, error):
    assert tool_here(monkeypatch, folder, name, *arguments.split()) == 2
    assert error in capsys.readouterr().err.splitlines()[-1]
