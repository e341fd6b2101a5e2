"""What the tools' command lines have in common."""

import argparse
import contextlib
import sys
from typing import Callable, Iterator, Optional

from ..errors import NATSError


def tool_parser(
    description: str, epilog: str, prog: Optional[str] = None
) -> argparse.ArgumentParser:
    """A parser whose help shows both texts unchanged, except that it fills in `%(prog)s`."""
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
