"""What the commands have in common, and how they are started."""

import argparse
import contextlib
import importlib
import sys
from pathlib import Path
from typing import Callable, Iterator, Optional

from ..errors import NATSError


def main() -> None:
    """Run the command under whose name this process was started: nats-search is :mod:`.search`."""
    name = Path(sys.argv[0]).stem
    module = name.removeprefix("nats-")
    try:
        importlib.import_module(f".{module}", __package__).run()
    except ModuleNotFoundError as error:
        package = error.name.split(".")[0]
        print(f"error: {name} needs {package}, which is not installed here", file=sys.stderr)
        sys.exit(2)


def tool_parser(
    description: str, epilog: str, prog: Optional[str] = None
) -> argparse.ArgumentParser:
    """A parser whose help shows both texts unchanged, except that it fills in `%(prog)s`.

    Args:
        prog: the command's name; of a script, that of its file.
    """
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def whole_number(most: int) -> Callable[[str], int]:
    """A `type` for :mod:`argparse`: a whole number from 1 to `most`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 to {most}")
        return int(text)

    return parse


@contextlib.contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """In the block, bad input prints one line to stderr and exits with status 2."""
    try:
        yield
    except NATSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run_tool(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Call ``main(args)`` in :func:`exit_on_bad_input`."""
    with exit_on_bad_input():
        main(args)


def write(path: str, content: Callable[[], None]) -> None:
    """Call ``content()``, which writes the file `path`, and print that it was written.

    Raises:
        NATSError: the file cannot be written.
    """
    try:
        content()
    except OSError as error:
        raise NATSError(f"{path}: cannot be written: {error.strerror or error}") from None
    print(f"wrote {path}")
