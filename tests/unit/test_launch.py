"""How a process of several leaves: with the exit status that it means."""

import errno

import pytest
import torch.distributed as dist

from detectron2_nats import NATSError, launch
from detectron2_nats.stopping import STOPPED_EXIT_CODE


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def raising(error):
    def main(args):
        if error is not None:
            raise error

    return main


def test_leaves_the_group_when_done(group):
    launch._call(raising(None), None)
    assert not dist.is_initialized()


def test_leaves_the_group_when_stopped(group):
    with pytest.raises(SystemExit) as stop:
        launch._call(raising(SystemExit(STOPPED_EXIT_CODE)), None)
    assert stop.value.code == STOPPED_EXIT_CODE and not dist.is_initialized()


@pytest.mark.parametrize(
    "error, status", [(NATSError("bad"), 2), (OSError(errno.ENOSPC, "full"), 1)]
)
def test_does_not_wait_for_the_others_after_an_error(group, monkeypatch, capfd, error, status):
    def exit_at_once(status):
        raise SystemExit(status)

    monkeypatch.setattr(launch, "exit_at_once", exit_at_once)
    with pytest.raises(SystemExit) as left:
        launch._call(raising(error), None)
    assert left.value.code == status and dist.is_initialized()
    assert capfd.readouterr().err.startswith("error: ")


def test_without_a_group_an_error_is_a_status(capfd):
    with pytest.raises(SystemExit) as left:
        launch._call(raising(NATSError("bad")), None)
    assert left.value.code == 2 and capfd.readouterr().err == "error: bad\n"
