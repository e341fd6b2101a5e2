"""Only one run at a time in a folder: a lock that is released when its process dies."""

import fcntl
import logging
import os
import socket
import time
from typing import IO, Dict

from ..errors import NATSError

logger = logging.getLogger(__name__)

_held: Dict[str, IO[str]] = {}  # the files stay open: closing one would release its lock


PATIENCE_S = 10.0
"""How long to wait for the lock, because a killed run's processes may take a moment to die."""


def lock_folder(folder: str) -> None:
    """Lock `folder` until this process ends, in whatever way.

    Raises:
        NATSError: another run holds the lock; names its host and process.
    """
    path = os.path.join(os.path.abspath(folder), ".lock")
    if path in _held:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(path, "a+")
    except OSError as error:
        raise NATSError(f"OUTPUT_DIR {folder}: cannot be written: {error.strerror}") from None
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            # lockf, not flock: loader processes would inherit flock's lock and keep it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):  # depends on the system
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read(1000).strip() or "of unknown name"
                file.close()
                raise NATSError(
                    f"{folder} is in use by another run, {holder}: wait for it, stop it, or "
                    "choose another OUTPUT_DIR"
                ) from None
            time.sleep(0.2)
        except OSError as error:
            logger.warning(f"{path} cannot be locked ({error}): do not start a second run there")
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[path] = file
