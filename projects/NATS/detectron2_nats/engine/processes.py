"""The processes of a run: Detectron2's launcher or torchrun starts them, a signal stops them.

SIGTERM, SIGUSR1 or Ctrl-C let the step finish and a checkpoint be written.
"""

import argparse
import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import traceback
from datetime import timedelta
from multiprocessing import util
from typing import Callable, Iterator, NoReturn, Sequence

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, _prctl_pr_set_pdeathsig

from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.utils import comm

from ..errors import NATSError
from .machine import check_gpus, share_out_cores

Main = Callable[[CfgNode, argparse.Namespace], object]
"""What each process of a run calls, with the config and the command line."""

# -- starting -------------------------------------------------------------------------------------


def run_in_processes(main: Main, cfg: CfgNode, args: argparse.Namespace) -> None:
    """Call ``main(cfg, args)`` in each process of the run.

    Exit status of each: 0 done; 2 bad input (one line on stderr); 75 stopped on request (if it was
    training, with a checkpoint); 130 interrupted twice, to a shell; 1 anything else. One process
    alone leaves errors to the caller.

    Args:
        args: of Detectron2's ``default_argument_parser``. A `dist_url` of "auto" is a free port of
            this machine.
    """
    if "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _run_under_torchrun(main, cfg, args)
    elif args.num_gpus * args.num_machines > 1:
        _launch(main, cfg, args)
    else:
        handle_signals("alone")
        main(cfg, args)


def _launch(main: Main, cfg: CfgNode, args: argparse.Namespace) -> None:
    check_gpus(cfg, args.num_gpus)
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else Detectron2 joins the ranks by their GPUs
    handle_signals("launcher")
    # PyTorch reports each rank that it ends; our error should be the last line
    logging.getLogger("torch.multiprocessing.spawn").addFilter(
        lambda record: not str(record.msg).startswith("Terminating process")
    )
    machines = args.num_machines, args.machine_rank, args.dist_url
    try:
        launch(_run_rank, args.num_gpus, *machines, args=(main, cfg, args))
    except ProcessExitedException as error:
        # a signal kills ranks that do not handle it yet, because they are still starting
        killed = STOPPED_EXIT_CODE if stop_requested() else 1
        sys.exit(error.exit_code if error.exit_code and error.exit_code > 0 else killed)


def _run_rank(main: Main, cfg: CfgNode, args: argparse.Namespace) -> None:
    die_with_parent()
    handle_signals("worker")
    share_out_cores(args.num_gpus)
    _call_in_group(main, cfg, args)


def _run_under_torchrun(main: Main, cfg: CfgNode, args: argparse.Namespace) -> None:
    die_with_parent()
    handle_signals("alone")
    local_rank, processes = (int(os.environ[key]) for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    check_gpus(cfg, processes)
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps this store over a restart. Without a prefix of its own, the new group would
        # find the addresses of the dead one.
        store = dist.PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    cuda = cfg.MODEL.DEVICE.startswith("cuda")
    if cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        timeout=timedelta(minutes=30),
        store=store,
        rank=rank,
        world_size=world_size,
    )
    comm.create_local_process_group(processes)
    share_out_cores(processes)
    comm.synchronize()  # so that a slow start does not use up the timeout of what comes next
    _call_in_group(main, cfg, args)


# -- stopping on request --------------------------------------------------------------------------

STOPPED_EXIT_CODE = 75
"""Exit status of a run that stopped on request (EX_TEMPFAIL in sysexits.h: try again)."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_stop = False


def stop_requested() -> bool:
    """Whether this process has been asked to stop."""
    return _stop


def handle_signals(role: str = "alone") -> None:
    """Let SIGTERM, SIGUSR1 and SIGINT request a stop. A second SIGINT kills at once.

    Args:
        role: "alone"; "launcher", which passes the request on to its workers; or "worker", which
            ignores SIGINT, because Ctrl-C also reaches the launcher.
    """
    global _stop
    _stop = False

    def handle(number, frame):
        global _stop
        _stop = True
        if role == "launcher":
            for process in multiprocessing.active_children():
                process.terminate()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    for number in _SIGNALS:
        signal.signal(number, handle)
    if role == "worker":
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """Delay stop requests to the end of the block. Processes started in it never receive them.

    For loader processes: a scheduler signals them too, but the run still needs their images. Call
    :func:`kill_children_at_exit` too: Python would send them SIGTERM at exit, and then wait.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def exit_at_once(status: int) -> NoReturn:
    """Exit without waiting for anything. For a process whose threads may hang or abort."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk, a closed pipe
            stream.flush()
    _kill_children()
    os._exit(status)


def kill(processes: Sequence[multiprocessing.Process]) -> None:
    """Kill child processes and wait for their end."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would report a crash
    for process in processes:
        process.kill()
        process.join()
    signal.signal(signal.SIGCHLD, before)


def _kill_children() -> None:
    kill(multiprocessing.active_children())


# -- leaving --------------------------------------------------------------------------------------


def _call_in_group(main: Main, cfg: CfgNode, args: argparse.Namespace) -> NoReturn:
    """Call ``main(cfg, args)`` and exit; after an error without waiting for the other ranks."""
    try:
        main(cfg, args)
    except SystemExit as stop:
        exit_at_once(stop.code or 0)
    except NATSError as error:
        # Every rank prints it: only one of them may have failed
        rank = comm.get_rank()
        print(f"error: {error}" + (f" [rank {rank}]" if rank else ""), file=sys.stderr)
        exit_at_once(2)
    except Exception as error:
        if isinstance(error, RuntimeError) and stop_requested():
            # Another rank stopped first, during an evaluation, and closed the connection
            exit_at_once(STOPPED_EXIT_CODE)
        traceback.print_exception(error)
        exit_at_once(1)
    exit_from_group()


def exit_from_group() -> NoReturn:
    """Exit with status 0 once all processes of the group have called this.

    The interpreter is not torn down, but :mod:`atexit` functions run. A thread of the group may
    still hold a tensor; releasing it during the teardown would abort the process. Destroying the
    group first does not help. It waits for that thread, which may be waiting for the interpreter.
    """
    comm.synchronize()
    try:
        atexit._run_exitfuncs()
    finally:  # an exception in one of them has been printed, and is not a failure
        exit_at_once(0)
