"""Scripts of tools/ and study/, nats-export and nats-show: what they write, and bad input."""

import ast
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from calls import call
from runs import REPOSITORY, TINY

import detectron2_nats
from detectron2.modeling import build_model
from detectron2_nats import Architecture, MixedDilationConv2d
from detectron2_nats.config import load_config

SCRIPTS = sorted(path for name in ("study", "tools") for path in (REPOSITORY / name).glob("*.py"))
PUBLIC = {
    "detectron2_nats": detectron2_nats.__all__,
    "detectron2_nats.config": ["load_config"],
    "detectron2_nats.show.cost": ["backbone_cost", "interleaved_seconds"],
    "detectron2_nats.toy": ["scenes", "sets"],  # for the weights that are made with them
}
"""All that a script may use of the package: module → names."""

MENDS = "clean_coco.py"
"""Mends just what the checks of the package refuse, so that it shares them."""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_use_public_names_only(path):
    if path.name == MENDS:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("detectron2_nats.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith(
            ("detectron2_nats", "nats_commands")
        ):
            assert {alias.name for alias in node.names} <= {
                *PUBLIC.get(node.module, ())
            }, node.module


# -- the demo --------------------------------------------------------------------------------------


def test_the_demo_prints_and_runs_the_commands_of_all_its_methods(tmp_path, monkeypatch, capsys):
    demo, trained = runpy.run_path(str(REPOSITORY / "tools/demo.py")), []

    class Done:
        returncode = 0

    def start(words, **_):
        trained.append(words[words.index("OUTPUT_DIR") + 1] if "OUTPUT_DIR" in words else "")
        return Done

    monkeypatch.setattr(demo["subprocess"], "run", start)
    for name, example in demo["EXAMPLES"].items():
        folders = demo["train_all"](name, example, str(tmp_path))
        assert list(folders)[0] == "plain" and {*example.draws} < {*folders}
        assert {*folders.values(), f"{tmp_path}/search"} == {*filter(None, trained)}
        printed = capsys.readouterr().out
        for command in ("nats-draw", "nats-search", "nats-train"):
            assert f"$ {command} --config-file " in printed
        for word in filter(lambda word: word.startswith("configs/"), printed.split()):
            assert (REPOSITORY / word).is_file()
        trained.clear()


def test_the_demo_reads_how_far_a_detector_sees():
    sees = runpy.run_path(str(REPOSITORY / "tools/demo.py"))["sees"]
    report = """
level sees, px      height    width
----------------  --------  -------
res2                    21       19
res3              over 230       45

objects on the input, px      10 %    half    90 %
height                         211     228     234
"""
    assert sees(report) == "over 230 × 45"


# -- commands --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With `search`, a search's output folder, and files that are damaged or in the way."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "search").mkdir()
    (folder / "tiny.yaml").write_text(f"VERSION: 2\n{TINY}")
    cfg = load_config(str(folder / "tiny.yaml"))
    torch.manual_seed(0)
    model = build_model(cfg)
    for conv in model.modules():
        if isinstance(conv, MixedDilationConv2d):
            torch.nn.init.normal_(conv.alpha)
    architecture = Architecture.decode(model.backbone, "paper", iteration=6)
    architecture.save(f"{folder}/search/architecture.yaml")
    architecture.save(f"{folder}/mine.yaml")
    (folder / "search/config.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, folder / "search/model_final.pth")
    (folder / "search/last_checkpoint").write_text("model_final.pth")
    values = {"alpha/entropy": 0.9, "alpha/votes_changed": 3, "intensity/res3.0.conv2/1x1": 1.0}
    (folder / "search/metrics.json").write_text(json.dumps({"iteration": 5, **values}) + "\n")
    (folder / "damaged").mkdir()
    for name in ("architecture.yaml", "config.yaml", "last_checkpoint"):
        (folder / "damaged" / name).write_text((folder / "search" / name).read_text())
    (folder / "damaged/model_final.pth").write_text("no checkpoint")
    (folder / "a_file").write_text("nothing of use")
    return folder


@pytest.mark.parametrize(
    "command, written",
    [
        ("nats-show search --output p", "p/architecture.png p/history.png"),
        ("nats-show mine.yaml --output q", "q/architecture.png"),
        (
            "nats-export search --order voted --weights w.pth --output voted.yaml",
            "w.pth voted.yaml",
        ),
    ],
)
def test_a_good_run_names_what_it_wrote(folder, monkeypatch, command, written):
    monkeypatch.chdir(folder)
    lines = call(command).splitlines()
    assert [line[6:] for line in lines if line.startswith("wrote ")] == written.split()
    assert all((folder / path).stat().st_size for path in written.split())


def test_a_margin_keeps_more_channels_plain(folder, monkeypatch):
    monkeypatch.chdir(folder)
    plain = []
    for margin in ("0", "0.1", "0.99"):
        call(f"nats-export search --margin {margin} --output margin.yaml")
        architecture = Architecture.from_config(load_config("margin.yaml").MODEL.NATS.ARCHITECTURE)
        plain.append(architecture.shares()[1, 1])
    assert plain[0] < plain[1] < plain[2] == 1


@pytest.mark.parametrize(
    "command, error",
    [
        ("show nowhere", "nowhere: neither a run's output folder nor an architecture file"),
        ("show search --output a_file", "a_file/architecture.png: cannot be written"),
        ("show a_file", "a_file: not an architecture file"),
        ("export none.yaml", "none.yaml: cannot be read"),
        ("export search --output a_file/x.yaml", "a_file/x.yaml: cannot be written"),
        ("export search --weights w.pth", "fit only an architecture in voted order"),
        ("export damaged --order voted", "no checkpoint in damaged is intact"),
        ("export search --margin 1.5", "DECODE_MARGIN 1.5: expected a share"),
    ],
)
def test_bad_input_is_one_line(folder, monkeypatch, command, error):
    monkeypatch.chdir(folder)
    *_, last = call(f"nats-{command}", status=2).splitlines()
    assert last.startswith("error: ") and error in last


@pytest.mark.parametrize(
    "script, arguments, error",
    [
        ("tools/pretrain_embedded.py", "--steps 0", "--steps 0: expected at least 1"),
        ("tools/make_val35k.py", "--annotations nowhere", "instances_val2014.json is missing"),
        ("study/run.py", "--methods nats-best", "'nats-best': expected one of plain, random"),
        (
            "study/run.py",
            "--config-file x --search-config x --folds 3",
            "--folds needs --annotations and --images",
        ),
    ],
)
def test_bad_options_of_scripts(folder, monkeypatch, capsys, script, arguments, error):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(REPOSITORY / os.path.dirname(script)))
    monkeypatch.setattr(sys, "argv", [script, *arguments.split()])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    assert error in capsys.readouterr().err.splitlines()[-1]
