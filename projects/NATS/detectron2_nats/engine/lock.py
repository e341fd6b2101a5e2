"""One run at a time in a folder, by a lock that dies with the process that holds it."""

import fcntl
import logging
import os
import socket
import time
from typing import IO, Dict

from ..errors import NATSError

__all__ = ["lock_folder"]

logger = logging.getLogger(__name__)

_held: Dict[str, IO[str]] = {}  # files open: to close one would give the lock back


def lock_folder(folder: str, patience: float = 10.0) -> None:
    """Hold `folder` until this process ends, by whatever means.

    Args:
        patience: seconds to wait, for the processes of a killed run may still be dying.

    Raises:
        NATSError: another run holds it; names its host and process.
    """
    path = os.path.join(os.path.abspath(folder), ".lock")
    if path in _held:
        return
    os.makedirs(folder, exist_ok=True)
    file = open(path, "a+")
    deadline = time.monotonic() + patience
    while True:
        try:
            # POSIX's locks, unlike flock's, are not inherited: loader processes keep none
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):  # systems differ
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
            logger.warning(f"{path} cannot be locked ({error}): start no second run there")
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[path] = file
