"""What may import what, and how long a file may be: the rules of CONTRIBUTING.md."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "projects/NATS/detectron2_nats"
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path):
    """The modules that a file imports, by their full names; also inside functions."""
    package = path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def lies_in(name: str, *packages: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def place(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


METHOD = [path for path in FILES if place(path).startswith("method/")]
CORE = [path for path in FILES if not place(path).startswith(("bench/", "commands/"))]


@pytest.mark.parametrize("path", METHOD, ids=place)
def test_the_method_needs_no_detectron2(path):
    """Of the package it needs its own files, errors and how files are read."""
    for name in imports(path):
        assert not lies_in(name, "detectron2", "fvcore", "iopath"), name
        if lies_in(name, "detectron2_nats"):
            allowed = (f"detectron2_nats.{part}" for part in ("method", "errors", "files"))
            assert lies_in(name, *allowed), name


@pytest.mark.parametrize("path", CORE, ids=place)
def test_only_commands_import_the_bench(path):
    for name in imports(path):
        assert not lies_in(name, "detectron2_nats.bench", "detectron2_nats.commands"), name


@pytest.mark.parametrize("path", FILES, ids=place)
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= 400
