"""The one error that a user is meant to read."""

import reprlib


class NATSError(ValueError):
    """Bad input: its message names the thing that is wrong and the cure, in one line.

    The scripts print it without a traceback and exit with status 2.
    """


def one_line(error: BaseException) -> str:
    """Kind and words of somebody else's error, for a message of ours."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def shown(value: object) -> str:
    """A value from a stranger's file, for a message of ours: one line, and short."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # Python refuses to print ints of thousands of digits
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 100 else text[:97] + "..."
