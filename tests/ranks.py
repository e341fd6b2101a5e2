"""A function of a test, called by two processes of one group."""

import socket
import traceback

import torch
import torch.multiprocessing as mp

from detectron2.utils import comm
from detectron2_nats.engine.processes import exit_from_group

# Ranks that are forked from a process that has imported: importing takes seconds.
mp.get_context("forkserver").set_forkserver_preload(["detectron2_nats.search.trainer"])


def start_rank(rank, port, backend, test, results, arguments):
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend, init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=rank
    )
    comm.create_local_process_group(2)
    try:
        results.put((rank, test(*arguments)))
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise
    exit_from_group()


def on_two_ranks(test, *arguments, backend="gloo"):
    """What `test(*arguments)` returns on rank 0 and on rank 1: little, else the pipe is full."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("forkserver").SimpleQueue()
    arguments = (port, backend, test, results, arguments)
    context = mp.start_processes(start_rank, arguments, 2, join=False, start_method="forkserver")
    while not context.join(timeout=120):
        pass
    return [value for _, value in sorted(results.get() for _ in range(2))]
