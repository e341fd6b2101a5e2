"""Stopping on request: SIGTERM, SIGUSR1 or Ctrl-C finish the step and write a checkpoint first."""

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
"""Exit status of a run that was asked to stop (EX_TEMPFAIL: try again)."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_stop = False


def stop_requested() -> bool:
    """Whether this process has been asked to stop."""
    return _stop


def handle_signals(role: str = "alone") -> None:
    """Let SIGTERM, SIGUSR1 and SIGINT request a stop; a second SIGINT leaves at once, status 130.

    Args:
        role: "alone"; "launcher", which passes the request on to the workers that it started; or
            "worker" of a launcher: Ctrl-C reaches it too, and is the launcher's to pass on.
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
    """Deliver requests to stop at the end of the block; processes started in it never see any.

    A loader process that is signalled before it comes to :func:`ignore_signals` would die of it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(worker_id: int = 0) -> None:
    """For loader processes: a scheduler signals them too, and the run still needs their images.

    The process that starts them must call :func:`kill_children_at_exit`, for Python ends what is
    left of them with SIGTERM and then waits.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_children_at_exit() -> None:
    """End child processes with SIGKILL when this one exits, by whatever way Python knows of."""
    # Above priority 0 it runs before multiprocessing's own clean-up; atexit is not run in children.
    util.Finalize(None, _kill_children, exitpriority=100)


def die_with_parent() -> None:
    """End this process by SIGKILL as soon as the one that started it is dead.

    For ranks: left behind, they would hold the GPUs and write where a resumed run writes.
    """
    starter = multiprocessing.parent_process()
    parent = starter.pid if starter else os.getppid()
    _prctl_pr_set_pdeathsig(signal.SIGKILL)  # by Linux itself, whatever this process does

    def watch():  # other systems; a parent that was dead already
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def exit_at_once(status: int) -> NoReturn:
    """Exit without waiting for anything: for a process whose threads may hang or abort."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk, a closed pipe
            stream.flush()
    _kill_children()
    os._exit(status)


def _kill_children() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take it for a crash
    _send_to_children(signal.SIGKILL)


def _send_to_children(number: int) -> None:
    for process in multiprocessing.active_children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
