"""Starts processes that need not import: forks of one that has imported all that is slow.

    python tests/warm.py SOCKET

Each connection to the socket asks for one process and then hears its pid and its exit status. The
fork ends like any other Python: what it runs is the last line of this file. Two things are not as
when a user starts it: it draws no pictures for TensorBoard, which take longer than a test's search,
and its ranks, and a study's runs, are forks, too.
"""

import atexit
import functools
import json
import os
import runpy
import select
import signal
import socket
import sys

import matplotlib.pyplot  # noqa: F401
import torch
import torch.utils.tensorboard

from detectron2_nats.commands import search
from detectron2_nats.engine import processes

search._ReportingTrainer._draw = lambda trainer: None
processes.start_processes = functools.partial(processes.start_processes, start_method="fork")


def serve(path: str) -> dict:
    """Returns in each fork, with what was asked for; ends with the process that started it."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{path}_")
    server.listen()
    os.rename(f"{path}_", path)  # now it answers
    awake, waker = socket.socketpair()
    waker.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno())
    connections = {}  # of the processes that run
    while True:
        ready, _, _ = select.select([server, awake, sys.stdin], [], [])
        if sys.stdin in ready:
            for pid in connections:  # of tests that failed
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        if awake in ready:
            awake.recv(1000)
            while connections:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                tell(connections.pop(pid), os.waitstatus_to_exitcode(status))
        if server in ready:
            connection, _ = server.accept()
            request = json.loads(connection.makefile().readline())
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for opened in (server, awake, waker, connection, *connections.values()):
                    opened.close()
                return request
            connections[pid] = connection
            tell(connection, pid)


def tell(connection: socket.socket, number: int) -> None:
    try:
        connection.sendall(f"{number}\n".encode())
    except OSError:
        pass  # nobody waits for it


def become(request: dict) -> None:
    if request["new_session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    files = request["files"]  # one for both, or two
    written = [os.open(file, os.O_WRONLY | os.O_APPEND) for file in files]
    os.dup2(written[0], 1)
    os.dup2(written[-1], 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    sys.argv = request["words"]
    sys.path[0] = os.path.dirname(sys.argv[0])


if __name__ == "__main__":
    become(serve(sys.argv[1]))
    runpy.run_path(sys.argv[0], run_name="__main__")
