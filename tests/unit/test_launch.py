"""How a process of several leaves: with the exit status that it means."""

import errno
import subprocess
import sys

import pytest
import torch.distributed as dist

from detectron2_nats import NATSError, launch
from detectron2_nats.stopping import STOPPED_EXIT_CODE


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def raising(error):
    def main(args):
        raise error

    return main


DONE = """
import atexit, builtins, os, sys
import torch.distributed as dist
from detectron2_nats import launch

class Torn:
    def __del__(self, write=os.write):
        write(1, b"torn down")

builtins.torn = Torn()  # goes with the interpreter
atexit.register(lambda: print("at exit", dist.is_initialized()))
atexit.register(lambda: 1 / 0)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
launch._call(print, "done")
"""


def test_leaves_the_group_when_done_and_tears_nothing_down():
    """A thread of the group that let go of a tensor meanwhile would abort the process."""
    process = subprocess.run([sys.executable, "-c", DONE], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, "done\nat exit False\n")
    assert "ZeroDivisionError" in process.stderr


@pytest.mark.parametrize(
    "error, status",
    [
        (NATSError("bad"), 2),
        (OSError(errno.ENOSPC, "full"), 1),
        (SystemExit(STOPPED_EXIT_CODE), STOPPED_EXIT_CODE),
        (SystemExit("error: words"), 1),
    ],
)
def test_waits_for_no_other_rank_otherwise(group, monkeypatch, capfd, error, status):
    monkeypatch.setattr(launch, "exit_at_once", sys.exit)
    with pytest.raises(SystemExit) as left:
        launch._call(raising(error), None)
    assert left.value.code == status and dist.is_initialized()
    assert capfd.readouterr().err.startswith("error: " if status < 75 else "")


def test_a_cut_connection_is_a_stop_only_when_one_was_asked_for(group, monkeypatch):
    monkeypatch.setattr(launch, "exit_at_once", sys.exit)
    with pytest.raises(RuntimeError):
        launch._call(raising(RuntimeError("connection closed")), None)
    monkeypatch.setattr(launch, "stop_requested", lambda: True)
    with pytest.raises(SystemExit, match="75"):
        launch._call(raising(RuntimeError("connection closed")), None)


def test_without_a_group_an_error_is_a_status(capfd):
    with pytest.raises(SystemExit) as left:
        launch._call(raising(NATSError("bad")), None)
    assert left.value.code == 2 and capfd.readouterr().err == "error: bad\n"


def test_the_processes_of_a_machine_share_its_cores(monkeypatch):
    """Whatever OMP_NUM_THREADS says goes before."""
    chosen = []
    monkeypatch.setattr(launch.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(launch.torch, "set_num_threads", chosen.append)
    launch._share_out_cores(2)  # conftest.py set it
    monkeypatch.delenv("OMP_NUM_THREADS")
    launch._share_out_cores(2)
    launch._share_out_cores(9)
    assert chosen == [4, 1]
