"""Commands, called in this process."""

import contextlib
import io
import shlex
import sys
from unittest import mock

import nats_commands


def call(*words, status=0) -> str:
    """What nats-NAME prints, to either stream; its exit status is checked.

    Args:
        words: "nats-look", then the arguments; or one string of all.
    """
    words = [str(word) for word in (shlex.split(words[0]) if len(words) == 1 else words)]
    printed = io.StringIO()
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(printed):
        with contextlib.redirect_stderr(printed):
            try:
                nats_commands.main()
                code = 0
            except SystemExit as end:
                code = end.code or 0
    assert code == status, printed.getvalue()
    return printed.getvalue()
