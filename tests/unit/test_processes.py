"""How a process of several leaves: with the exit status that it means."""

import sys

import pytest
import torch
import torch.distributed as dist

from detectron2_nats import NATSError
from detectron2_nats.commands import train
from detectron2_nats.config import load_config
from detectron2_nats.engine import processes
from detectron2_nats.engine.processes import STOPPED_EXIT_CODE


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def raising(error):
    def main(cfg, args):
        raise error

    return main


@pytest.mark.parametrize(
    "error, status",
    [
        (NATSError("bad"), 2),
        (SystemExit(STOPPED_EXIT_CODE), STOPPED_EXIT_CODE),
    ],
)
def test_waits_for_no_other_rank_otherwise(group, monkeypatch, capfd, error, status):
    monkeypatch.setattr(processes, "exit_at_once", sys.exit)
    with pytest.raises(SystemExit) as left:
        processes._call(raising(error), None, None)
    assert left.value.code == status and dist.is_initialized()
    assert capfd.readouterr().err.startswith("error: " if status < 75 else "")


def test_a_cut_connection_is_a_stop_only_when_one_was_asked_for(group, monkeypatch, capfd):
    monkeypatch.setattr(processes, "exit_at_once", sys.exit)
    with pytest.raises(SystemExit, match="^1$"):
        processes._call(raising(RuntimeError("connection closed")), None, None)
    assert capfd.readouterr().err.endswith("RuntimeError: connection closed\n")
    monkeypatch.setattr(processes, "stop_requested", lambda: True)
    with pytest.raises(SystemExit, match="75"):
        processes._call(raising(RuntimeError("connection closed")), None, None)


def test_a_restart_by_torchrun_reads_nothing_of_the_dead_group(monkeypatch):
    """torchrun keeps its store, where the addresses of the dead ranks are."""
    kept, groups = dist.HashStore(), []
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(kept, 0, 1)]))
    monkeypatch.setattr(processes, "_join_group", lambda *_, store, **__: groups.append(store))
    for function in ("die_with_parent", "handle_signals", "_call"):
        monkeypatch.setattr(processes, function, lambda *_: None)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        processes._run_under_torchrun(None, load_config("", ["MODEL.DEVICE", "cpu"]), None)
    first, second = groups
    first.set("address", "of the dead")
    assert first.check(["address"]) and not second.check(["address"])


def test_a_rank_that_fails_leaves_at_once(group, monkeypatch, capfd):
    """A teardown of the interpreter would wait for the others in NCCL."""
    left = []
    monkeypatch.setattr(processes, "exit_at_once", left.append)
    monkeypatch.setattr(processes, "exit_from_group", lambda: None)
    with pytest.raises(SystemExit):
        processes._call(raising(KeyError("no such thing")), None, None)
    assert left == [1] and capfd.readouterr().err.endswith("KeyError: 'no such thing'\n")


def allocate(cfg, args):
    torch.empty(2**50)


@pytest.mark.parametrize(
    "main",
    [allocate, raising(torch.OutOfMemoryError("CUDA out of memory")), raising(MemoryError())],
)
def test_out_of_memory_says_what_to_lower(capfd, main):
    with pytest.raises(SystemExit, match="^1$"):
        processes._call(main, None, None)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: out of memory: lower SOLVER.IMS_PER_BATCH")


def test_without_a_group_an_error_is_a_status(capfd):
    with pytest.raises(SystemExit) as left:
        processes._call(raising(NATSError("bad")), None, None)
    assert left.value.code == 2 and capfd.readouterr().err == "error: bad\n"


def test_the_processes_of_a_machine_share_its_cores(monkeypatch):
    """Whatever OMP_NUM_THREADS says goes before."""
    chosen = []
    monkeypatch.setattr(processes.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(processes.torch, "set_num_threads", chosen.append)
    processes._share_out_cores(2)  # conftest.py set it
    monkeypatch.delenv("OMP_NUM_THREADS")
    processes._share_out_cores(2)
    processes._share_out_cores(9)
    assert chosen == [4, 1]


def test_several_processes_without_a_gpu_each_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(processes, "why_no_cuda", lambda: "the driver is too old")
    words = "GPUs that PyTorch can use here: 0 .the driver is too old.. .*add MODEL.DEVICE cpu"
    with pytest.raises(NATSError, match=words):
        processes._check_gpus(load_config(""), 2)
    processes._check_gpus(load_config("", ["MODEL.DEVICE", "cpu"]), 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(NATSError, match="machine: 2, GPUs that PyTorch can use here: 1. Start"):
        processes._check_gpus(load_config(""), 2)
    processes._check_gpus(load_config(""), 1)


def test_the_reason_is_pytorchs(monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "init", init)
    assert processes.why_no_cuda() == "RuntimeError: The NVIDIA driver on your system is too old"


@pytest.mark.parametrize("device, expected", [("cpu", ["gloo"]), ("cuda", [1, "nccl"])])
def test_the_device_chooses_the_groups_backend(monkeypatch, device, expected):
    """Not whether there is a GPU."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cpu")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: chosen.append(backend))
    monkeypatch.setattr(processes.comm, "create_local_process_group", lambda size: None)
    processes._join_group(device, 1, 2, rank=1, world_size=2)
    assert chosen == expected


@pytest.mark.parametrize("capability, emulated", [("AVX2", True), ("AVX512", False)])
def test_emulated_bfloat16_is_told(monkeypatch, capability, emulated):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    options = ["MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION"]
    assert train._emulates_bfloat16(load_config("", [*options, "bfloat16"])) == emulated
    assert not train._emulates_bfloat16(load_config("", [*options, "float16"]))
    options += ["bfloat16", "MODEL.DEVICE", "cuda"]
    assert not train._emulates_bfloat16(load_config("", options))
