"""The command lines of nats-look, -draw, -search, -train, -show and -export.

Outside the package, because that imports torch: help, versions and wrong arguments need no seconds.
A file for each command: its description, examples and arguments. What it does is in
:mod:`detectron2_nats.commands`, imported once the words are right.
"""

import argparse
import importlib
import sys
from importlib import metadata
from pathlib import Path
from typing import Optional

COMMANDS = ("look", "draw", "search", "train", "show", "export")


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a command, "look" for nats-look."""
    command = importlib.import_module(f".{name}", __name__)
    parser = argparse.ArgumentParser(
        prog=f"nats-{name}",
        description=command.__doc__,
        epilog=command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    command.add_arguments(parser)
    return parser


def _version() -> str:
    try:
        return f"detectron2-nats {metadata.version('detectron2-nats')}"
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "detectron2-nats, not installed"


def main(name: Optional[str] = None) -> None:
    """Parse the command line, then import what it needs and do it.

    Exit status: 2 for bad input, with one line; else the command's.

    Args:
        name: of the command; else that under which this process was started.
    """
    name = name or Path(sys.argv[0]).stem.removeprefix("nats-")
    parser = parser_of(name)
    # of these, options may stand between the words
    mixed = name in ("look", "show")
    args = parser.parse_intermixed_args() if mixed else parser.parse_args()
    try:
        from detectron2_nats import NATSError

        try:
            importlib.import_module(f"detectron2_nats.commands.{name}").main(args)
        except NATSError as error:
            sys.exit(_refused(error))
    except ModuleNotFoundError as error:  # some packages are imported where they are needed
        package = error.name.split(".")[0]
        sys.exit(_refused(f"nats-{name} needs {package}, which is not installed here"))


def _refused(reason: object) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 2
