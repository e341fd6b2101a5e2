"""What each tool's command line has in common."""

import argparse
import sys
from typing import Callable, Optional

from .errors import NATSError

__all__ = ["run_tool", "tool_parser", "write"]


def tool_parser(
    description: str, epilog: str, prog: Optional[str] = None
) -> argparse.ArgumentParser:
    """A parser whose help shows both texts as they are, but for `%(prog)s`."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_tool(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Call ``main(args)``; bad input is one line on stderr and exit status 2."""
    try:
        main(args)
    except NATSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def write(path: str, content: Callable[[], None]) -> None:
    """Call ``content()``, which writes the file `path`, and say so.

    Raises:
        NATSError: it cannot be written.
    """
    try:
        content()
    except OSError as error:
        raise NATSError(f"{path}: cannot be written: {error.strerror or error}") from None
    print(f"wrote {path}")
