"""Stop on request: SIGTERM, SIGUSR1 or Ctrl-C let the step finish and a checkpoint be written."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing import util
from typing import Iterator, NoReturn

from torch.multiprocessing import _prctl_pr_set_pdeathsig

__all__ = [
    "STOPPED_EXIT_CODE",
    "die_with_parent",
    "exit_at_once",
    "handle_signals",
    "hold_signals",
    "ignore_signals",
    "kill_children_at_exit",
    "stop_requested",
]

STOPPED_EXIT_CODE = 75
"""Exit status of a run that stopped on request (EX_TEMPFAIL in sysexits.h: try again)."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_stop = False


def stop_requested() -> bool:
    """Whether this process has been asked to stop."""
    return _stop


def handle_signals(role: str = "alone") -> None:
    """Let SIGTERM, SIGUSR1 and SIGINT request a stop. A second SIGINT exits at once, status 130.

    Args:
        role: "alone"; "launcher", which passes the request on to its workers; or "worker", which
            ignores SIGINT, because Ctrl-C also reaches the launcher.
    """
    global _stop
    _stop = False

    def handle(number, frame):
        global _stop
        if number == signal.SIGINT and _stop:
            if role == "launcher":
                _send_to_children(signal.SIGKILL)
            os._exit(130)
        _stop = True
        if role == "launcher":
            _send_to_children(signal.SIGTERM)

    for number in _SIGNALS:
        signal.signal(number, handle)
    if role == "worker":
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def hold_signals() -> Iterator[None]:
    """Delay stop requests to the end of the block. Processes started in it never receive them.

    Otherwise a signal would kill a loader process that has not yet called :func:`ignore_signals`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(worker_id: int = 0) -> None:
    """For loader processes: a scheduler signals them too, but the run still needs their images.

    The process that starts them must call :func:`kill_children_at_exit`. Python itself would send
    them SIGTERM at exit, and then wait.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_children_at_exit() -> None:
    """Kill the child processes when this process exits in any way that Python notices."""
    # A priority above 0 runs before multiprocessing's own clean-up. Not atexit: child processes do
    # not run it.
    util.Finalize(None, _kill_children, exitpriority=100)


def die_with_parent() -> None:
    """Kill this process as soon as the process that started it is dead.

    For ranks: without it they would keep the GPUs, and write to the resumed run's OUTPUT_DIR.
    """
    starter = multiprocessing.parent_process()
    parent = starter.pid if starter else os.getppid()
    _prctl_pr_set_pdeathsig(signal.SIGKILL)  # Linux does it, whatever this process is doing

    def watch():  # for other systems, and for a parent that has died before the line above
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def exit_at_once(status: int) -> NoReturn:
    """Exit without waiting for anything. For a process whose threads may hang or abort."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk, a closed pipe
            stream.flush()
    _kill_children()
    os._exit(status)


def _kill_children() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report a crash
    _send_to_children(signal.SIGKILL)


def _send_to_children(number: int) -> None:
    for process in multiprocessing.active_children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
