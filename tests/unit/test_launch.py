"""How a process of several leaves: with the exit status that it means."""

import sys

import pytest
import torch
import torch.distributed as dist

from detectron2_nats import NATSError
from detectron2_nats.config import load_config
from detectron2_nats.engine import launch
from detectron2_nats.engine.stopping import STOPPED_EXIT_CODE


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def raising(error):
    def main(args):
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
    monkeypatch.setattr(launch, "exit_at_once", sys.exit)
    with pytest.raises(SystemExit) as left:
        launch._call(raising(error), None)
    assert left.value.code == status and dist.is_initialized()
    assert capfd.readouterr().err.startswith("error: " if status < 75 else "")


def test_a_cut_connection_is_a_stop_only_when_one_was_asked_for(group, monkeypatch, capfd):
    monkeypatch.setattr(launch, "exit_at_once", sys.exit)
    with pytest.raises(SystemExit, match="^1$"):
        launch._call(raising(RuntimeError("connection closed")), None)
    assert capfd.readouterr().err.endswith("RuntimeError: connection closed\n")
    monkeypatch.setattr(launch, "stop_requested", lambda: True)
    with pytest.raises(SystemExit, match="75"):
        launch._call(raising(RuntimeError("connection closed")), None)


def test_a_rank_that_fails_leaves_at_once(group, monkeypatch, capfd):
    """A teardown of the interpreter would wait for the others in NCCL."""
    left = []
    monkeypatch.setattr(launch, "exit_at_once", left.append)
    monkeypatch.setattr(launch, "exit_from_group", lambda: None)
    with pytest.raises(SystemExit):
        launch._call(raising(KeyError("no such thing")), None)
    assert left == [1] and capfd.readouterr().err.endswith("KeyError: 'no such thing'\n")


def allocate(args):
    torch.empty(2**50)


@pytest.mark.parametrize(
    "main",
    [allocate, raising(torch.OutOfMemoryError("CUDA out of memory")), raising(MemoryError())],
)
def test_out_of_memory_says_what_to_lower(capfd, main):
    with pytest.raises(SystemExit, match="^1$"):
        launch._call(main, None)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: out of memory: lower SOLVER.IMS_PER_BATCH")


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


def arguments(*opts):
    return launch.default_argument_parser().parse_args(["--num-gpus", "2", *opts])


def test_several_processes_without_a_gpu_each_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch, "_why_no_cuda", lambda: "the driver is too old")
    words = "GPUs that PyTorch can use here: 0 .the driver is too old.. .*add MODEL.DEVICE cpu"
    with pytest.raises(NATSError, match=words):
        launch._device_of_group(arguments(), 2)
    assert launch._device_of_group(arguments("MODEL.DEVICE", "cpu"), 2) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(NATSError, match="machine: 2, GPUs that PyTorch can use here: 1. Start"):
        launch._device_of_group(arguments(), 2)
    assert launch._device_of_group(arguments(), 1) == "cuda"


def test_the_reason_is_pytorchs(monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "init", init)
    assert launch._why_no_cuda() == "RuntimeError: The NVIDIA driver on your system is too old"


@pytest.mark.parametrize("device, expected", [("cpu", ["gloo"]), ("cuda", [1, "nccl"])])
def test_the_device_chooses_the_groups_backend(monkeypatch, device, expected):
    """Not whether there is a GPU."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cpu")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: chosen.append(backend))
    monkeypatch.setattr(launch.comm, "create_local_process_group", lambda size: None)
    launch._join_group(device, 1, 2, rank=1, world_size=2)
    assert chosen == expected


@pytest.mark.parametrize("capability, emulated", [("AVX2", True), ("AVX512", False)])
def test_emulated_bfloat16_is_told(monkeypatch, capability, emulated):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    options = ["MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION"]
    assert launch._emulates_bfloat16(load_config("", [*options, "bfloat16"])) == emulated
    assert not launch._emulates_bfloat16(load_config("", [*options, "float16"]))
    options += ["bfloat16", "MODEL.DEVICE", "cuda"]
    assert not launch._emulates_bfloat16(load_config("", options))
