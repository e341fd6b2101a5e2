"""The processes of a run: start them (our own, torchrun's), stop on a signal, leave with a status.

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
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing import util
from typing import Callable, Iterator, NoReturn, Sequence

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore
from torch.multiprocessing import (
    ProcessExitedException,
    ProcessRaisedException,
    _prctl_pr_set_pdeathsig,
    start_processes,
)

from detectron2.config import CfgNode
from detectron2.engine.launch import _find_free_port
from detectron2.utils import comm

from ..errors import NATSError, one_line

Main = Callable[[CfgNode, argparse.Namespace], object]
"""What each process of a run calls, with the config and the command line."""

# -- starting -------------------------------------------------------------------------------------


def run_in_processes(main: Main, cfg: CfgNode, args: argparse.Namespace) -> NoReturn:
    """Call ``main(cfg, args)`` in each process of the run, and exit.

    Exit status: 0 done; 2 bad input (one line on stderr); 75 stopped on request (if it was
    training, with a checkpoint); 130 interrupted twice; 1 anything else.

    Args:
        args: of Detectron2's ``default_argument_parser``. A `dist_url` of "auto" is a free port of
            this machine.
    """
    try:
        if "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ:
            _run_under_torchrun(main, cfg, args)
        elif args.num_gpus * args.num_machines > 1:
            _launch(main, cfg, args)
        else:
            handle_signals("alone")
            _call(main, cfg, args)
    except NATSError as error:
        sys.exit(_report(error))
    except ProcessExitedException as error:
        # a signal kills ranks that do not handle it yet, because they are still starting
        killed = STOPPED_EXIT_CODE if stop_requested() else 1
        sys.exit(error.exit_code if error.exit_code and error.exit_code > 0 else killed)
    except ProcessRaisedException as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def _launch(main: Main, cfg: CfgNode, args: argparse.Namespace) -> None:
    """Detectron2's ``launch``, except that MODEL.DEVICE decides between CPU and GPUs."""
    _check_gpus(cfg, args.num_gpus)
    if args.dist_url == "auto":  # two runs on one machine must not use the same port
        args.dist_url = f"tcp://127.0.0.1:{_find_free_port()}"
    handle_signals("launcher")
    # PyTorch reports each rank that it ends; our error should be the last line
    logging.getLogger("torch.multiprocessing.spawn").addFilter(
        lambda record: not str(record.msg).startswith("Terminating process")
    )
    start_processes(_worker, (main, cfg, args), nprocs=args.num_gpus)


def _worker(local_rank: int, main: Main, cfg: CfgNode, args: argparse.Namespace) -> None:
    die_with_parent()
    _join_group(
        cfg.MODEL.DEVICE,
        local_rank,
        args.num_gpus,
        init_method=args.dist_url,
        rank=args.machine_rank * args.num_gpus + local_rank,
        world_size=args.num_machines * args.num_gpus,
    )
    handle_signals("worker")
    _call(main, cfg, args)


def _run_under_torchrun(main: Main, cfg: CfgNode, args: argparse.Namespace) -> None:
    die_with_parent()
    handle_signals("alone")
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and not args.resume and not args.eval_only:
        raise NATSError(
            "torchrun --max-restarts also needs --resume: a restart would find the checkpoints of "
            "an earlier run. Without any, --resume starts from the beginning"
        )
    local_rank, processes = (int(os.environ[key]) for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    _check_gpus(cfg, processes)
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps this store over a restart. Without a prefix of its own, the new group would
        # find the addresses of the dead one.
        store = PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    group = {"store": store, "rank": rank, "world_size": world_size}
    _join_group(cfg.MODEL.DEVICE, local_rank, processes, **group)
    _call(main, cfg, args)


def _check_gpus(cfg: CfgNode, processes: int) -> None:
    """Raise NATSError if the processes are for GPUs, and this machine has too few."""
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        return
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if here < processes:
        reason = "" if here else f" ({why_no_cuda()})"
        raise NATSError(
            f"processes on this machine: {processes}, GPUs that PyTorch can use here: {here}"
            f"{reason}. Start fewer, or add MODEL.DEVICE cpu to compute on the CPU"
        )


def _join_group(device: str, local_rank: int, processes: int, **group) -> None:
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(local_rank)
    else:
        _share_out_cores(processes)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30), **group)
    comm.create_local_process_group(processes)
    comm.synchronize()  # so that a slow start does not use up the timeout of what comes next


def why_no_cuda() -> str:
    """PyTorch's reason for using no GPU."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:  # PyTorch without CUDA, or no usable GPU
        return one_line(error)
    return "no reason given"


def _share_out_cores(processes: int) -> None:
    """Give each process on this machine its share of the cores.

    The last bit of a sum depends on the number of threads, so OMP_NUM_THREADS goes first.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))


# -- stopping on request --------------------------------------------------------------------------

STOPPED_EXIT_CODE = 75
"""Exit status of a run that stopped on request (EX_TEMPFAIL in sysexits.h: try again)."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_stop = False


def stop_requested() -> bool:
    """Whether this process has been asked to stop."""
    return _stop


def handle_signals(role: str = "alone") -> None:
    """Let SIGTERM, SIGUSR1 and SIGINT request a stop. A second SIGINT exits at once, status 130.

    Args:
        role: "alone"; "launcher", which passes the request on to its workers; or "worker", which
            ignores SIGINT, because Ctrl-C also reaches the launcher.
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
    """Delay stop requests to the end of the block. Processes started in it never receive them.

    Otherwise a signal would kill a loader process that has not yet called :func:`ignore_signals`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """For loader processes: a scheduler signals them too, but the run still needs their images.

    The process that starts them must call :func:`kill_children_at_exit`. Python itself would send
    them SIGTERM at exit, and then wait.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


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

    def watch():  # for other systems, and for a parent that has died before the line above
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


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
    for process in processes:
        process.join()
    signal.signal(signal.SIGCHLD, before)


def _kill_children() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report a crash
    _send_to_children(signal.SIGKILL)


def _send_to_children(number: int) -> None:
    for process in multiprocessing.active_children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


# -- leaving --------------------------------------------------------------------------------------


def _call(main: Main, cfg: CfgNode, args: argparse.Namespace) -> None:
    status = 0
    try:
        main(cfg, args)
    except SystemExit as stop:
        status = stop.code or 0
    except Exception as error:
        status = _report(error)
    if dist.is_initialized():
        if status:  # a normal exit would wait in NCCL for the other ranks
            exit_at_once(status)
        exit_from_group()
    if status:
        sys.exit(status)


def _report(error: Exception) -> int:
    """Print what is wrong; returns the exit status."""
    if isinstance(error, NATSError):
        # Every rank prints it: only one of them may have failed
        rank = comm.get_rank()
        print(f"error: {error}" + (f" [rank {rank}]" if rank else ""), file=sys.stderr, flush=True)
        return 2
    if isinstance(error, RuntimeError) and dist.is_initialized() and stop_requested():
        # Another rank stopped first, during an evaluation, and closed the connection
        return STOPPED_EXIT_CODE
    traceback.print_exception(error)
    # GPU memory or main memory: the types of the errors do not tell
    words = ("out of memory", "can't allocate memory")
    if isinstance(error, MemoryError) or any(word in str(error) for word in words):
        less = (
            "lower SOLVER.IMS_PER_BATCH or INPUT.MIN_SIZE_TRAIN, or set SOLVER.AMP.ENABLED True "
            "or, in a search, SEARCH.ALPHA_IMS_PER_BATCH to the number of processes or "
            "MODEL.NATS.SHARE_WEIGHTS True, and start a new run"
        )
        print(f"error: out of memory: {less}", file=sys.stderr, flush=True)
    return 1


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
