"""The one error that a user is meant to read."""

__all__ = ["NATSError"]


class NATSError(ValueError):
    """Bad input: its message names the thing that is wrong and the cure, in one line.

    The scripts print it without a traceback and exit with status 2.
    """
