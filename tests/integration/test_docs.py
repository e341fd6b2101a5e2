"""Every command in the documentation does what it says, or at least can be parsed.

Commands stand in the code blocks and inline code of Markdown pages, and after `$` in the help of
scripts and commands. What can run on the embedded data set is run, in a copy of a folder that holds
the files that the pages speak of; what needs COCO, many GPUs or hours is parsed by its own parser
and its config is loaded. A command for which RULES has no line fails.
"""

import argparse
import ast
import json
import os
import pickle
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from functools import lru_cache, partial
from pathlib import Path
from typing import Dict, List, NamedTuple

import pytest
import torch
import torchvision
from runs import REPOSITORY, TINY, Warm, finish

from detectron2.modeling import build_backbone, build_model
from detectron2_nats import Architecture, apply_architecture
from detectron2_nats.commands import cli
from detectron2_nats.config import load_config
from detectron2_nats.files import parse_yaml
from detectron2_nats.look import rule as look
from detectron2_nats.search.export import export_config, searched_detector, write_config

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "projects/NATS/README.md",
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "CHANGELOG.md",
    REPOSITORY / "configs/README.md",
]
PAGES += sorted((REPOSITORY / "docs").glob("*.md"))
PAGES += sorted((REPOSITORY / "docs/results").glob("*.md"))
SOURCES = {  # script or command → where its help stands
    str(path.relative_to(REPOSITORY)): path
    for folder in ("tools", "examples")
    for path in sorted((REPOSITORY / folder).glob("*.py"))
}
SOURCES["tests/faults/run_faults.py"] = REPOSITORY / "tests/faults/run_faults.py"
for path in sorted((REPOSITORY / "projects/NATS/detectron2_nats/commands").glob("*.py")):
    if "EPILOG" in path.read_text():
        SOURCES[f"nats-{path.stem.removesuffix('_architecture')}"] = path

# What stands in the text → what is run instead. The files that it then names are made by
# `workspace` below.
SUBSTITUTIONS = [
    (
        r"((?:train_net\.py|nats-train) .*--config-file) \.\.\.",
        r"\1 configs/quickstart/base.yaml",
    ),
    (r"--config-file \.\.\.", "--config-file configs/quickstart/search.yaml"),
    (r"--num-gpus 8 (--config-file output/)", r"\1"),
    (r"'\$SLURM_NODEID'", "0"),
    (r"output/demo_bars/seed_0/", "output/bars/"),
    (r"(nats-report) output/demo", r"\1 output/bars/search-nats"),
    (r"output/improved/retrain.yaml", "output/search/retrain.yaml"),
    (
        r"(nats-study) \.\.\.",
        r"\1 --config-file configs/quickstart/base.yaml "
        "--search-config configs/quickstart/search.yaml",
    ),
    (r"mine\.yaml", "architecture.yaml"),
    (r"output/bars_lying/seed_0/search-nats", "output/search"),
    (r"DETECTRON2_DATASETS=/data", "DETECTRON2_DATASETS=datasets"),
]

TRAINS = r"(python (search_net|train_net)\.py|nats-(search|train))"

# The first pattern that is found decides: the name of a check_… function below.
RULES = [
    (r"^make [a-z-]+$", "make"),
    (r"^source \.venv/bin/activate$", "activate"),
    (r"^pip install -r \S+$", "requirements"),
    (r"^(TORCH_\w+=1 )?torchrun ", "torchrun"),
    (r"^tensorboard --logdir ", "tensorboard"),
    # COCO, its weights, or several machines
    (rf"^{TRAINS} .*configs/(search|retrain|study)/", "parsed"),
    (rf"^{TRAINS} .*--num-(gpus|machines)", "parsed"),
    # minutes to hours
    (r"^python tools/(benchmark|demo|pretrain_embedded)\.py", "parsed"),
    (r"^nats-study ", "parsed"),
    # run by test_examples.py and test_score.py
    (
        r"^python examples/((torchvision|timm|timm_detector|rtdetr)_search|export_detector)\.py",
        "parsed",
    ),
    (r"^nats-score (?!output/search --write)", "parsed"),
    (r"^python tests/faults/run_faults\.py", "parsed"),
    (rf"^{TRAINS} ", "trained"),
    (r"^(DETECTRON2_DATASETS=\S+ )?python tools/make_val35k\.py", "run"),
    (r"^nats-(analyze|draw|export|import|look|plot|report|score) ", "run"),
    (r"^python examples/\w+\.py", "run"),
]

# Appended to what is trained, and to what is run.
SHORT = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.CHECKPOINT_PERIOD", "1000"]
SHORT += ["DATALOADER.NUM_WORKERS", "0", "INPUT.MIN_SIZE_TRAIN", "(64,)", "SEED", "1"]
SHORT += ["SEARCH.SCORE_IMAGES", "0"]  # test_compare.py
SHORT += ["MODEL.ROI_HEADS.NUM_CLASSES", "5", "INPUT.MIN_SIZE_TEST", "64"]
FEW_IMAGES = ["DATASETS.REGISTER", "[['few', 'val.json', 'images']]", "DATASETS.TEST", "('few',)"]
SMALL = {
    "nats-plot": ["--images", "1"],
    "nats-analyze": ["--size", "64", "96"],
    "examples/lazyconfig_search.py": [
        *("train.init_checkpoint=", "train.max_iter=3", "dataloader.train.num_workers=0"),
        *(f"model.backbone.bottom_up.{part}.norm=BN" for part in ("stem", "stages")),
        "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
    ],
    "nats-score": ["--images", "2", "--random", "2"],
    "tools/make_val35k.py": ["--force"],
}
RES3_WIDE = Architecture({f"res3.{block}.conv2": [[32, 1, 3]] for block in range(4)})
# So that what is found fits a ResNet-50 of the zoo.
FULL_WIDTH = ["MODEL.RESNETS.STEM_OUT_CHANNELS", "64", "MODEL.RESNETS.WIDTH_PER_GROUP", "64"]
FULL_WIDTH += ["MODEL.RESNETS.RES2_OUT_CHANNELS", "256", "SEARCH.ALPHA_START", "0.0"]


# In prose, `nats-export --weights` speaks of an option.
INLINE = r"(?<!`)`((?:(?:python|make|torchrun) |nats-\w+ (?:[^-]|--config-file ))[^`]+)`"


class Text(NamedTuple):
    """Something to be tested, and where it stands."""

    place: str
    text: str


# -- collecting ---------------------------------------------------------------------------------


def blocks(page: Path):
    """(language, place, lines) of each code block; "indented" is the language of those."""
    language, found, start, blank = None, [], 0, True
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines + [""], 1):
        fence = re.match(r"\s*```(\w*)", line)
        if language is None and fence:
            language, found, start = fence[1] or "none", [], number + 1
        elif language not in (None, "indented"):
            if fence:
                yield language, f"{page.relative_to(REPOSITORY)}:{start}", found
                language = None
            else:
                found.append(line)
        elif re.match(r" {4,}\S", line):
            if language is None and blank:
                language, found, start = "indented", [], number
            found.append(line.strip())
        elif language == "indented":
            yield language, f"{page.relative_to(REPOSITORY)}:{start}", found
            language = None
        blank = not line.strip()


def joined(place: str, lines: List[str]) -> List[Text]:
    """Lines as commands, those that end in a backslash with the next."""
    text = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [Text(place, line.strip()) for line in text.splitlines() if line.strip()]


def commands_of_pages() -> List[Text]:
    found = []
    for page in PAGES:
        for language, place, lines in blocks(page):
            if language in ("bash", "indented"):
                if not lines[0].startswith("#!"):
                    found += joined(place, lines)
                    continue
                for line in joined(place, lines):  # a shell script: what it calls in the end
                    called = re.findall(r"(?:python \S+\.py|nats-\w+) [^']*", line.text)
                    found += [Text(place, command) for command in called]
        for number, line in enumerate(page.read_text().splitlines(), 1):
            for inline in re.findall(INLINE, line):
                found.append(Text(f"{page.relative_to(REPOSITORY)}:{number}", inline))
    return found


def examples(script: str) -> List[Text]:
    """After `$ ` in the strings of a script, or of a command's module."""
    found = []
    nodes = list(ast.walk(ast.parse(SOURCES[script].read_text().replace("%(prog)s", script))))
    formatted = {
        id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values
    }
    for node in nodes:
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in formatted
        ):
            text = re.sub(r"\s*\\\n\s*", " ", node.value)
            found += re.findall(r"^  +\$ +(.+)$", text, re.M)
    return [Text(script, command) for command in found]


def substituted(command: str) -> str:
    command = shlex.join(shlex.split(command.replace("…", "..."), comments=True))
    for pattern, replacement in SUBSTITUTIONS:
        command = re.sub(pattern, replacement, command)
    return command


def commands() -> List[Text]:
    """Each command once, as it is tested."""
    found: Dict[str, Text] = {}
    for place, text in commands_of_pages() + [e for script in SOURCES for e in examples(script)]:
        text = substituted(text)
        same = re.sub(r"^python (search|train)_net\.py", r"nats-\1", text)
        found.setdefault(same, Text(place, text))
    return list(found.values())


def python_blocks() -> List[Text]:
    return [
        Text(place, "\n".join(lines))
        for page in PAGES
        for language, place, lines in blocks(page)
        if language == "python"
    ]


def yaml_blocks() -> List[Text]:
    return [
        Text(place, "\n".join(lines))
        for page in PAGES
        for language, place, lines in blocks(page)
        if language == "yaml"
    ]


def name_of(item: Text) -> str:
    return f"{item.place} {item.text.splitlines()[0][:70]}"


# -- the files that the pages speak of ----------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder like the repository's root after a search and some training."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("configs", "examples", "tools", "search_net.py", "train_net.py"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "tiny.yaml").write_text(f"VERSION: 2\n{TINY}")
    search = shlex.split("python search_net.py --config-file tiny.yaml OUTPUT_DIR output/search")
    started(folder, search + FULL_WIDTH + SHORT + ["DATASETS.TEST", "()"])
    (folder / "tiny.yaml").unlink()
    for name in ("architecture.yaml", "retrain.yaml"):
        shutil.copy(folder / "output/search" / name, folder)
    architecture = Architecture.load(str(folder / "architecture.yaml"))
    everywhere = {n: [(sum(c for c, *_ in s), 3, 3)] for n, s in architecture.layers.items()}
    Architecture(everywhere).save(str(folder / "output/search/all_3x3.yaml"))  # a score's

    plain = load_config(str(REPOSITORY / "configs/quickstart/base.yaml"))
    searched = load_config(str(folder / "retrain.yaml"))
    for cfg, paths in (
        (plain, ["output/model_final.pth", "output/plain/model_final.pth"]),
        (searched, ["output/search/retrain/model_final.pth", "output/searched/model_final.pth"]),
    ):
        cfg.MODEL.DEVICE = "cpu"
        state_dict = build_model(cfg).state_dict()
        for path in paths:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            torch.save({"model": state_dict}, folder / path)

    # what `make demo-bars` leaves
    bars = load_config(str(REPOSITORY / "configs/quickstart/bars.yaml"))
    shutil.copytree(folder / "output/search", folder / "output/bars/search-nats")
    searched = export_config(bars, RES3_WIDE)
    write_config(searched, str(folder / "output/bars/nats-warm/retrain.yaml"))
    for cfg, name in ((bars, "plain"), (searched, "nats-warm")):
        cfg.MODEL.DEVICE = "cpu"
        path = folder / "output/bars" / name
        path.mkdir(exist_ok=True)
        torch.save({"model": build_model(cfg).state_dict()}, path / "model_final.pth")

    # own data: the embedded images under other names, a half-width network
    from detectron2_nats.toy.sets import ensure_embedded_dataset

    source = Path(ensure_embedded_dataset())
    (folder / "images").mkdir()
    for name, split in (("train", "train"), ("calib", "calibration"), ("val", "val")):
        content = json.loads((source / f"instances_{split}.json").read_text())
        content["images"] = content["images"][:8]
        names = {image["id"]: image["file_name"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in names]
        (folder / f"{name}.json").write_text(json.dumps(content))
        for image in names.values():
            (folder / "images" / image).symlink_to((source / split / image).resolve())
    own = load_config(str(REPOSITORY / "configs/examples/own_data_retrain.yaml"))
    own.MODEL.DEVICE = "cpu"
    weights = {key: value.numpy() for key, value in build_backbone(own).state_dict().items()}
    (folder / "path/to").mkdir(parents=True)
    with open(folder / "path/to/R-50-half.pkl", "wb") as file:
        content = {"model": weights, "__author__": "a test", "matching_heuristics": True}
        pickle.dump(content, file)
    half = {
        name: [[channels // 2, *dilation] for channels, *dilation in segments]
        for name, segments in architecture.layers.items()
    }
    own.MODEL.WEIGHTS = "path/to/R-50-half.pkl"
    write_config(export_config(own, Architecture(half)), str(folder / "output/own_data.yaml"))
    (folder / "output/own_data").mkdir()
    os.rename(folder / "output/own_data.yaml", folder / "output/own_data/retrain.yaml")

    # other methods' files
    pattern, structure = [], {}
    for stage, blocks_of_stage in enumerate((3, 4, 6, 3)):
        pattern += [{"(0, 0)": 32 * 2**stage, "(0, 2)": 32 * 2**stage}] * blocks_of_stage
        for block in range(blocks_of_stage):
            structure[f"backbone.layer{stage + 1}.{block}.conv2"] = 1 + block % 3
    (folder / "ic_resnet50_k9.json").write_text(json.dumps(pattern))
    (folder / "local_search_config_step11.json").write_text(json.dumps({"structure": structure}))
    run_here(folder, "nats-import ic_resnet50_k9.json --output ic_conv.yaml")
    # a draw, and torchvision's weights
    drawn = "nats-draw --config-file configs/quickstart/bars.yaml --random --output output/drawn"
    run_here(folder, drawn)
    torch.save(torchvision.models.resnet50().half().state_dict(), folder / "resnet50.pth")

    # COCO, of a few images
    annotations = folder / "datasets/coco/annotations"
    annotations.mkdir(parents=True)
    for split, ids in (("val2014", range(1, 6)), ("val2017", (2, 4))):
        images = [{"id": i, "file_name": f"{i}.jpg", "height": 9, "width": 9} for i in ids]
        content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "x"}]}
        (annotations / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def here(workspace, tmp_path, monkeypatch) -> Path:
    """A copy of it, to work in: what is written is seen by no other test."""
    folder = tmp_path / "root"
    shutil.copytree(workspace, folder, symlinks=True, copy_function=os.link)
    monkeypatch.chdir(folder)
    return folder


def environment() -> Dict[str, str]:
    changes = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY / "projects/NATS"),
        "DETECTRON2_DATASETS": str((REPOSITORY / "datasets").resolve()),
    }
    return {**os.environ, **changes}


def started(folder: Path, words: List[str]) -> str:
    """Run a command in a process of its own; returns what it printed."""
    file, *arguments = words[1:] if words[0] == "python" else words
    if file.startswith("nats-"):
        file = str(Path(sys.executable).with_name(file))
    return finish(
        Warm(
            [file if os.path.isabs(file) else str(folder / file), *arguments], folder, environment()
        )
    )


def _skip_without_packages(script: str) -> None:
    needed = {
        "examples/pointrend_searched.py": "cv2",
        "examples/rtdetr_search.py": "transformers",
        "examples/timm_detector_search.py": "timm",
        "examples/timm_search.py": "timm",
    }
    if script in needed:
        pytest.importorskip(needed[script])


def called(script: str, folder: Path = REPOSITORY) -> None:
    """Call what a script or command calls, with `sys.argv` as it is."""
    if script.startswith("nats-"):
        cli.main()
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str((folder / script).parent))  # as Python does
            runpy.run_path(str(folder / script), run_name="__main__")


def run_here(folder: Path, command: str) -> None:
    """Run a script or command in this process, which spares the imports."""
    words = shlex.split(command)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        while "=" in words[0]:
            patch.setenv(*words.pop(0).split("=", 1))
        words = words[1:] if words[0] == "python" else words
        _skip_without_packages(words[0])
        patch.setattr(sys, "argv", words)
        # a field's true size needs large inputs, for seconds
        patch.setattr(look, "field_extents", partial(look.field_extents, sides=[(96, 1)]))
        try:
            called(words[0], folder)
        except SystemExit as status:
            assert not status.code, status.code


# -- the checks ---------------------------------------------------------------------------------


@lru_cache(maxsize=None)
def parser_of(script: str) -> argparse.ArgumentParser:
    """A script's or command's parser, caught where it is about to be used."""

    class Caught(Exception):
        pass

    def catch(parser, *_):
        raise Caught(parser)

    def catch_intermixed(parser, *_):
        parser.parse_args = parser.parse_intermixed_args  # for whoever parses with it
        raise Caught(parser)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", catch_intermixed)
        patch.setattr(sys, "argv", [script])
        _skip_without_packages(script)
        try:
            called(script)
        except Caught as caught:
            return caught.args[0]
    raise AssertionError(f"{script} parses no command line")


def check_make(command: str, _) -> None:
    target = command.split()[1]
    assert re.search(rf"^{target}:.*##", (REPOSITORY / "Makefile").read_text(), re.M), target


def check_activate(command: str, _) -> None:
    assert "venv=.venv" in (REPOSITORY / "tools/setup_env.sh").read_text()


def check_requirements(command: str, _) -> None:
    assert (REPOSITORY / command.split()[-1]).is_file()


def check_tensorboard(command: str, here: Path) -> None:
    (folder,) = re.findall(r"--logdir (\S+)", command)
    assert list((here / folder).glob("events.out.tfevents.*"))
    assert (Path(sys.executable).parent / "tensorboard").exists()


def check_torchrun(command: str, here: Path) -> None:
    from torch.distributed.run import get_args_parser

    words = shlex.split(command)
    args = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    script = args.training_script
    if args.module:
        script = {"detectron2_nats.commands.search": "nats-search"}[script]
    python = [] if script.startswith("nats-") else ["python"]
    check_parsed(shlex.join([*python, script, *args.training_script_args]), here)


def check_parsed(command: str, here: Path) -> None:
    """Its options exist, the files that it names do, and its config takes its KEY VALUE pairs."""
    script, *words = shlex.split(command.removeprefix("python "))
    args = parser_of(script).parse_args(words)
    for word in words:
        if re.match(r"(configs|docs|examples|tests|tools)/", word):
            assert (REPOSITORY / word).exists(), word
    for key in ("config_file", "search_config"):
        if getattr(args, key, ""):
            load_config(getattr(args, key), [o for o in getattr(args, "opts", []) if o != "--"])
    if re.match(TRAINS, command):
        cfg = load_config(args.config_file, args.opts)
        is_search = cfg.MODEL.BACKBONE.NAME == "build_nats_backbone" and not (
            cfg.MODEL.NATS.ARCHITECTURE
        )
        assert is_search == ("search" in script), "the config is for the other script"
        if is_search:  # its result has to fit the config that receives it
            nats, other = cfg.MODEL.NATS, cfg.SEARCH.RETRAIN_CONFIG
            base = load_config(other) if other else searched_detector(cfg)
            cfg.MODEL.BACKBONE.NAME = nats.BASE_BACKBONE
            with torch.device("meta"):
                network = build_backbone(cfg)
            export_config(base, Architecture.uniform(network, (1, 1), nats.STAGES, nats.CONVS))


def check_trained(command: str, here: Path) -> None:
    """Two iterations of it, or its evaluation."""
    words = shlex.split(command)
    evaluates = "--eval-only" in words
    more = list(SHORT)
    if "OUTPUT_DIR" not in words:
        more += ["OUTPUT_DIR", "output/here"]
    if evaluates:
        more += FEW_IMAGES
    elif "DATASETS.TEST" not in words:
        more += ["DATASETS.TEST", "()"]
    printed = started(here, words + more)
    words += more
    folder = here / words[words.index("OUTPUT_DIR") + 1]
    if evaluates:
        assert "Evaluation results for few" in printed
    else:
        assert (folder / "model_final.pth").is_file()
        assert (folder / "retrain.yaml").is_file() == ("search" in " ".join(words[:2]))


def check_run(command: str, here: Path, capsys) -> None:
    """It ends well, and its last line names a file that is there."""
    script = next(word for word in shlex.split(command) if re.search(r"^nats-|\.py$", word))
    capsys.readouterr()
    run_here(here, shlex.join([*shlex.split(command), *SMALL.get(script, [])]))
    printed = capsys.readouterr().out
    last = printed.splitlines()[-1]
    if script == "nats-analyze":
        assert last.split()[0] == "activations"
    elif script in ("nats-draw", "nats-look"):  # the next command comes last
        assert re.match("next: |No objects are given", last)
        for path in re.findall("^wrote (.*)$", printed, re.M):
            assert (here / path).is_file()
    else:
        path = last.removeprefix("wrote ").split(" (")[0]
        assert (here / path).is_file(), last


# -- the tests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("item", commands(), ids=name_of)
def test_command(item, here, capsys):
    for pattern, kind in RULES:
        if re.search(pattern, item.text):
            break
    else:
        raise AssertionError(
            f"{item.place}: nothing says how to test `{item.text}`: add a line to RULES in "
            "tests/integration/test_docs.py, and a text or file that it needs to SUBSTITUTIONS or "
            "workspace"
        )
    check = globals()[f"check_{kind}"]
    if kind == "run":
        check(item.text, here, capsys)
    else:
        check(item.text, here)


@pytest.mark.parametrize("item", python_blocks(), ids=name_of)
def test_python_block(item, here):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(item.text, item.place, "exec"), {"__name__": "example"})


@pytest.mark.parametrize("item", yaml_blocks(), ids=name_of)
def test_yaml_block(item, tmp_path):
    """An architecture file, or a config: of a ResNet-50 where it names layers."""
    content = parse_yaml(item.text, item.place)
    if "format" in content:
        architecture = Architecture.from_dict(content)
    else:
        path = tmp_path / "block.yaml"
        path.write_text(f"VERSION: 2\n{item.text}")
        cfg = load_config(str(path))
        if not cfg.MODEL.NATS.ARCHITECTURE:
            return
        architecture = Architecture.from_config(cfg.MODEL.NATS.ARCHITECTURE)
    plain = load_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    with torch.device("meta"):
        apply_architecture(build_backbone(plain), architecture)


@pytest.mark.parametrize("script", SOURCES)
def test_help_has_an_example_of_itself(script):
    shown = parser_of(script).format_help()
    assert any(script in e.text for e in examples(script)), f"{script}: no example in its help"
    assert re.search(rf"\$ .*{re.escape(script)}", shown)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_page(page):
    """Shell scripts parse, links lead somewhere, and no command hides in a block of plain text."""
    for language, place, lines in blocks(page):
        known = ("bash", "indented", "none", "python", "text", "yaml")
        assert language in known, f"{place}: {language}: collect it in tests/integration/test_docs"
        if language == "bash":
            done = subprocess.run(["bash", "-n"], input="\n".join(lines), text=True)
            assert done.returncode == 0, place
        if language in ("none", "text"):
            for line in lines:
                hidden = re.match(
                    r"\s*(\$|python|pip|make|torchrun|bash|tensorboard|nats-\w+) ", line
                )
                assert not hidden, f"{place}: a command in a block without a language: {line}"
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
