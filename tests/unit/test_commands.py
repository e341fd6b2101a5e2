"""The command lines: quick, few options, and every one that the pages print can be parsed."""

import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from calls import call

import nats_commands
from detectron2_nats.config import load_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "configs/README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "CONTRIBUTING.md", ROOT / "projects/NATS/README.md", ROOT / "study/README.md"]


@pytest.mark.parametrize("name", nats_commands.COMMANDS)
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_need_no_torch(name, option):
    code = f"import nats_commands, sys; sys.argv[1:] = ['{option}']; nats_commands.main('{name}')"
    environment = {"PYTHONPATH": str(ROOT / "projects/NATS")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and not done.stderr
    printed = done.stdout.decode()
    assert "examples:" in printed if option == "--help" else printed.startswith("detectron2-nats")
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 1


@pytest.mark.parametrize("name", nats_commands.COMMANDS)
def test_at_most_eight_options_each_with_its_help(name):
    actions = nats_commands.parser_of(name)._actions
    options = [a for a in actions if a.option_strings and a.dest not in ("help", "version")]
    assert len(options) <= 8
    assert all(action.help for action in actions)


@pytest.mark.parametrize("text, words", [("1", "height x width"), ("0x3", "1 to 64"), ("axb", "")])
def test_a_dilation_is_height_and_width(text, words):
    command = ["nats-draw", "--config-file", "a", "--output", "b", "--uniform", text]
    assert words in call(*command, status=2)


# -- what the pages print -------------------------------------------------------------------------


def commands(text: str):
    """The nats- commands, search_net.py and train_net.py in a page or a help text, as words."""
    text = re.sub(r"\s*\\\n\s*", " ", text)
    start = (
        r"(?:nats-(\w+)|python (?:\w+/)*(search|train)_net\.py|torchrun .*(search|train)_net\.py)"
    )
    for line in re.findall(rf"^(?: {{4,}}|\$ ){start} (.*)$", text, re.M):
        name = next(filter(None, line[:3]))
        yield name, shlex.split(line[3], comments=True)


def of_pages():
    texts = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES if page.is_file()}
    for name in nats_commands.COMMANDS:
        texts[f"nats-{name} --help"] = nats_commands.parser_of(name).format_help()
    for place, text in texts.items():
        for name, words in commands(text):
            yield pytest.param(name, words, id=f"{place}: nats-{name} {' '.join(words)[:60]}")


@pytest.mark.parametrize("name, words", of_pages())
def test_a_printed_command_can_be_parsed_and_its_files_are_there(name, words):
    assert name in nats_commands.COMMANDS
    parser = nats_commands.parser_of(name)
    mixed = name in ("look", "show")
    args = parser.parse_intermixed_args(words) if mixed else parser.parse_args(words)
    configs = [w for w in words if w.startswith("configs/")]
    assert all((ROOT / path).is_file() for path in configs), configs
    config = getattr(args, "config_file", "")
    if hasattr(args, "opts") and (config.startswith(("configs/", "COCO"))):
        load_config(config, args.opts)  # each KEY is known, each VALUE of its type
    elif hasattr(args, "opts"):
        load_config("", args.opts)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        if not page.is_file():
            continue
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), f"{page}: {target}"
            if anchor and linked.suffix == ".md":
                titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
                slugs = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
                assert anchor in slugs, f"{page}: {target}"


def test_the_python_example_of_the_readme_runs(tmp_path, monkeypatch):
    call(
        *("nats-draw", "--config-file", ROOT / "configs/quickstart/registers.yaml"),
        *("--uniform", "5x1", "--output", tmp_path, "MODEL.DEVICE", "cpu"),
    )
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names = {}
    exec(code, names)
    dilations = {tuple(m.dilation) for m in names["model"].modules() if hasattr(m, "dilation")}
    assert (5, 1) in dilations
