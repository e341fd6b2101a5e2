"""What the commands have in common."""

from typing import Callable

from nats_commands import main

from ..errors import NATSError

__all__ = ["main", "write"]


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
