"""A wheel: what it holds, what it needs, and that the method works without Detectron2."""

import configparser
import json
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = ["draw", "export", "look", "search", "show", "train"]

WITHOUT_DETECTRON2 = """
import sys
for name in ("detectron2", "fvcore", "iopath", "pycocotools"):
    sys.modules[name] = None  # importing it fails
"""

METHOD = """
import pytest, torch, torchvision
import detectron2_nats as nats
from detectron2_nats.toy.sets import WEIGHTS

assert nats.__file__.startswith(sys.argv[1]), nats.__file__
assert torch.load(WEIGHTS)
space = nats.SearchSpace("A", ["res5.*"], num_groups=2)
supernet = nats.to_supernet(torchvision.models.resnet18().eval(), space)
alphas = nats.alpha_parameters(supernet)
with nats.alpha_training(supernet):
    supernet(torch.rand(1, 3, 64, 64)).sum().backward()
assert all(alpha.grad is not None for alpha in alphas)
architecture = nats.Architecture.decode(supernet, "voted")
architecture.save("architecture.yaml")
frozen = nats.apply_architecture(torchvision.models.resnet18(), "architecture.yaml")
frozen.load_state_dict(nats.frozen_state_dict(supernet, architecture))
nats.fuse_for_inference(frozen.eval())
assert set(nats.__all__) == {name for name in nats.__all__ if hasattr(nats, name)}
with pytest.raises(ImportError, match="SearchTrainer needs Detectron2"):
    nats.SearchTrainer
with pytest.raises(ImportError, match="add_nats_config needs Detectron2"):
    from detectron2_nats import add_nats_config
with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    nats.nothing
"""

RUN = """
import json, sys
from nats_commands import main
for name, *arguments in json.loads(sys.argv[1]):
    sys.argv = [f"/somewhere/bin/nats-{name}", *arguments]
    try:
        main()
    except SystemExit as status:
        print(f"{name}: {status.code}")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that holds what the wheel holds."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    caches = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(REPOSITORY / "projects", source / "projects", ignore=caches)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "."]
    done = subprocess.run(pip, cwd=source, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (wheel,) = source.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(built)
    return built


def python(site, folder, code, *arguments):
    """Run code in a process that finds the package in `site`, and the repository nowhere."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run(command, cwd=folder, env=environment, timeout=600, **pipes)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_metadata(site):
    (info,) = site.glob("*.dist-info")
    metadata = Parser().parsestr((info / "METADATA").read_text())
    assert metadata["Name"] == "detectron2-nats" and metadata["Requires-Python"] == ">=3.10"
    needed = {line.split(">")[0].split("=")[0] for line in metadata.get_all("Requires-Dist")}
    assert needed == {"torch", "numpy", "PyYAML", "matplotlib", "pillow", "tabulate"}
    assert metadata.get_payload().startswith("# detectron2-nats")
    scripts = configparser.ConfigParser()
    scripts.read(info / "entry_points.txt")
    names = [f"nats-{name}" for name in COMMANDS]
    assert dict(scripts["console_scripts"]) == dict.fromkeys(names, "nats_commands:main")
    files = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    mine = {
        str(path.relative_to(REPOSITORY / "projects/NATS"))
        for kind in ("*.py", "*.pth", "*.yaml", "*.jpg", "*.json", "*LICENSE")
        for package in ("detectron2_nats", "nats_commands")
        for path in (REPOSITORY / "projects/NATS" / package).rglob(kind)
    }
    assert mine == {
        name for name in files if name.startswith(("detectron2_nats/", "nats_commands/"))
    }


def test_the_method_without_detectron2(site, tmp_path):
    python(site, tmp_path, WITHOUT_DETECTRON2 + METHOD, site)


def test_commands_without_detectron2(site, tmp_path):
    """Drawn networks, and pictures of architectures; the others say what is missing."""
    missing = ("search", "train", "export")
    network = ["--network", "torchvision:resnet18", "--uniform", "1x5", "--output", "drawn"]
    words = [["draw", *network], ["show", "drawn/architecture.yaml"]]
    words += [["look", "--levels", "layer1", *network[:2]], ["look", "a.yaml", "b.pth"]]
    words += [[name, "found.yaml"] for name in missing]
    printed = python(site, tmp_path, WITHOUT_DETECTRON2 + RUN, json.dumps(words))
    wrote = [line for line in printed.splitlines() if line.startswith("wrote ")]
    assert wrote == ["wrote drawn/architecture.yaml", "wrote drawn/pictures/architecture.png"]
    assert "\nlayer1 " in printed
    for name in ("look", *missing):
        message = f"error: nats-{name} needs detectron2, which is not installed here"
        assert f"{message}\n" in printed and f"{name}: 2\n" in printed


def test_commands_with_detectron2(site, tmp_path):
    pytest.importorskip("detectron2")
    code = f"{RUN}import detectron2_nats as nats\nprint(nats.SearchTrainer.__name__)"
    words = json.dumps([[name, "--help"] for name in COMMANDS])
    printed = python(site, tmp_path, code, words)
    for name in COMMANDS:
        assert f"usage: nats-{name} " in printed and f"$ nats-{name} " in printed
        assert f"{name}: 0\n" in printed
    assert "\nSearchTrainer\n" in printed
