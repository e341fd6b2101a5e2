"""The lock on OUTPUT_DIR: one run at a time, and none longer than its process."""

import fcntl
import multiprocessing
import os
import socket
import time

import pytest

from detectron2_nats import NATSError
from detectron2_nats.engine import lock


def hold(folder, loaders):
    lock.lock_folder(folder)
    loader = os.fork()  # as a loader process: it lives longer than the one that holds the lock
    if loader:
        loaders.send(loader)
    time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=hold, args=(str(tmp_path), there))
    process.start()
    process.loader = here.recv()
    yield process
    process.kill()
    process.join()
    os.kill(process.loader, 9)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NATSError, match="OUTPUT_DIR .*file: cannot be written"):
        lock.lock_folder(str(tmp_path / "file"))


def test_names_who_holds_the_folder(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_S", 0.3)
    words = f"{tmp_path} is in use by another run, process {holder.pid} on {socket.gethostname()}: "
    for _ in range(2):
        with pytest.raises(NATSError) as error:
            lock.lock_folder(str(tmp_path))
        assert str(error.value).startswith(words)


def test_is_free_when_the_holder_is_dead_though_its_children_live(holder, tmp_path):
    holder.kill()
    lock.lock_folder(str(tmp_path))
    os.kill(holder.loader, 0)  # it does live
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    lock.lock_folder(str(tmp_path))  # the same process, again


def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(file, flags):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    lock.lock_folder(str(tmp_path / "new"))
    assert f"{tmp_path}/new/.lock cannot be locked" in caplog.text
