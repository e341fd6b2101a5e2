"""How a process of several leaves: with the exit status that it means."""

import argparse
import logging
import multiprocessing
import os
import signal
import sys

import pytest
import torch
import torch.distributed as dist

from detectron2_nats import NATSError
from detectron2_nats.config import load_config
from detectron2_nats.engine import machine, processes
from detectron2_nats.engine.processes import STOPPED_EXIT_CODE


def raising(error):
    def main(cfg, args):
        raise error

    return main


@pytest.mark.parametrize(
    "error, asked, status, printed",
    [
        (NATSError("bad"), False, 2, "error: bad\n"),
        (SystemExit(STOPPED_EXIT_CODE), True, STOPPED_EXIT_CODE, ""),
        (KeyError("no such thing"), False, 1, "KeyError: 'no such thing'\n"),
        (RuntimeError("connection closed"), False, 1, "RuntimeError: connection closed\n"),
        (RuntimeError("connection closed"), True, STOPPED_EXIT_CODE, ""),
    ],
)
def test_a_rank_that_fails_leaves_at_once(monkeypatch, capfd, error, asked, status, printed):
    """A teardown of the interpreter would wait for the others in NCCL."""
    monkeypatch.setattr(processes, "exit_at_once", sys.exit)
    monkeypatch.setattr(processes, "stop_requested", lambda: asked)
    with pytest.raises(SystemExit) as left:
        processes._call_in_group(raising(error), None, None)
    assert left.value.code == status
    text = capfd.readouterr().err
    assert text.endswith(printed) and text.count("Traceback") == (status == 1)


def test_a_restart_by_torchrun_reads_nothing_of_the_dead_group(monkeypatch):
    """torchrun keeps its store, where the addresses of the dead ranks are."""
    kept, groups = dist.HashStore(), []
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(kept, 0, 1)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, store, **__: groups.append(store))
    monkeypatch.setattr(processes.comm, "create_local_process_group", lambda size: None)
    for function in ("die_with_parent", "handle_signals", "_call_in_group"):
        monkeypatch.setattr(processes, function, lambda *_: None)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        processes._run_under_torchrun(None, load_config("", ["MODEL.DEVICE", "cpu"]), None)
    first, second = groups
    first.set("address", "of the dead")
    assert first.check(["address"]) and not second.check(["address"])


def test_the_processes_of_a_machine_share_its_cores(monkeypatch):
    """Whatever OMP_NUM_THREADS says goes before."""
    threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    machine.share_out_cores(2)  # conftest.py set it
    monkeypatch.delenv("OMP_NUM_THREADS")
    machine.share_out_cores(2)
    machine.share_out_cores(9)
    assert threads == [4, 1]


def test_several_processes_without_a_gpu_each_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "why_no_cuda", lambda: "the driver is too old")
    words = "GPUs that PyTorch can use here: 0 .the driver is too old.. .*add MODEL.DEVICE cpu"
    with pytest.raises(NATSError, match=words):
        machine.check_gpus(load_config(""), 2)
    machine.check_gpus(load_config("", ["MODEL.DEVICE", "cpu"]), 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(NATSError, match="machine: 2, GPUs that PyTorch can use here: 1. Start"):
        machine.check_gpus(load_config(""), 2)
    machine.check_gpus(load_config(""), 1)


def test_one_process_without_a_gpu_computes_on_the_cpu_and_says_so(monkeypatch, caplog):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(logging.getLogger("detectron2_nats"), "parent", logging.getLogger())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    cfg = load_config("")
    machine.set_usable_device(cfg)
    assert cfg.MODEL.DEVICE == "cpu"
    assert "finds no GPU: RuntimeError: The NVIDIA driver on your system" in caplog.text


def test_detectron2s_launcher_gets_the_machines_and_sees_no_gpu_that_is_not_wanted(monkeypatch):
    """By the GPUs that it sees it would choose NCCL."""
    launched = []
    monkeypatch.setattr(processes, "launch", lambda *words, **more: launched.append((words, more)))
    monkeypatch.setattr(processes, "handle_signals", lambda role: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    place = dict(num_gpus=2, num_machines=3, machine_rank=1, dist_url="tcp://first:29500")
    args, cfg = argparse.Namespace(**place), load_config("", ["MODEL.DEVICE", "cpu"])
    processes._launch(print, cfg, args)
    words = (processes._run_rank, 2, 3, 1, "tcp://first:29500")
    assert launched == [(words, {"args": (print, cfg, args)})]
    assert not os.environ["CUDA_VISIBLE_DEVICES"]


def interrupted(times):
    processes.handle_signals("alone")
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)
    sys.exit(75 if processes.stop_requested() else 1)


@pytest.mark.parametrize("times, status", [(1, 75), (2, -signal.SIGINT)])
def test_the_second_interrupt_ends_at_once(times, status):
    process = multiprocessing.get_context("fork").Process(target=interrupted, args=(times,))
    process.start()
    process.join(30)
    assert process.exitcode == status
