"""Start a script: arguments, processes (our own, torchrun's, several machines), exit status."""

import argparse
import atexit
import contextlib
import logging
import os
import sys
import traceback
from datetime import timedelta
from typing import Callable, Iterator, NoReturn, Optional, Type

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore
from torch.multiprocessing import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.engine.launch import _find_free_port
from detectron2.modeling import build_model
from detectron2.utils import comm

from ..config import check_names, load_config
from ..data.registry import (
    check_data,
    check_datasets,
    check_registered_classes,
    register_datasets,
)
from ..errors import NATSError, one_line
from ..files import read_bounded, write_atomically
from .checkpoint import SafeCheckpointer
from .lock import lock_folder
from .resumable import ResumableTrainer
from .stopping import (
    STOPPED_EXIT_CODE,
    die_with_parent,
    exit_at_once,
    handle_signals,
    stop_requested,
)

__all__ = ["exit_from_group", "run_script", "setup", "train_or_evaluate"]

logger = logging.getLogger(__name__)


def setup(args: argparse.Namespace) -> CfgNode:
    """Read the config, check it and its data sets, lock OUTPUT_DIR and start the log."""
    cfg = load_config(args.config_file, args.opts)
    no_cuda = cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available()
    if no_cuda:
        cfg.MODEL.DEVICE = "cpu"
    if cfg.SOLVER.AMP.PRECISION not in ("float16", "bfloat16"):
        raise NATSError(
            f"SOLVER.AMP.PRECISION {cfg.SOLVER.AMP.PRECISION!r}: expected float16 or bfloat16"
        )
    check_names(cfg)
    register_datasets(cfg)
    if not args.eval_only:
        if not cfg.DATASETS.TRAIN:
            raise NATSError("DATASETS.TRAIN is empty: name the data set to train on")
        check_datasets(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
    elif not cfg.DATASETS.TEST:
        raise NATSError("DATASETS.TEST is empty: name the data set to evaluate on")
    check_datasets(cfg.DATASETS.TEST, "DATASETS.TEST")
    cfg.freeze()
    if comm.is_main_process() and not args.eval_only:
        lock_folder(cfg.OUTPUT_DIR)
    if args.config_file and not os.path.isfile(args.config_file):
        args.config_file = ""  # a zoo name: default_setup would open it as a file
    with _unchanged(_config_path(cfg)):  # default_setup overwrites it
        default_setup(cfg, args)
    logging.getLogger("detectron2_nats").parent = logging.getLogger("detectron2")
    if no_cuda:
        logger.warning(f"computing on the CPU, because PyTorch finds no GPU: {_why_no_cuda()}")
    if _emulates_bfloat16(cfg):
        logger.warning(
            "this CPU has no bfloat16: PyTorch emulates it, several times slower than float32. "
            "Stop, and start with SOLVER.AMP.ENABLED False"
        )
    return cfg


def _config_path(cfg: CfgNode) -> str:
    """config.yaml: how the checkpoints in the folder were made. Exports and scores rely on it."""
    return os.path.join(cfg.OUTPUT_DIR, "config.yaml")


@contextlib.contextmanager
def _unchanged(path: str) -> Iterator[None]:
    """In the main process: if the file is there, write it again as it was."""
    earlier = read_bounded(path) if comm.is_main_process() and os.path.isfile(path) else None
    yield
    if earlier is not None:
        write_atomically(path, lambda file: file.write(earlier))


def _emulates_bfloat16(cfg: CfgNode) -> bool:
    amp = cfg.SOLVER.AMP
    wanted = cfg.MODEL.DEVICE == "cpu" and amp.ENABLED and amp.PRECISION == "bfloat16"
    return wanted and torch.backends.cpu.get_cpu_capability() == "AVX2"


def train_or_evaluate(
    trainer_class: Type[ResumableTrainer], cfg: CfgNode, args: argparse.Namespace
):
    """Do what the command line asks for: evaluate, start training, or resume it."""
    if args.eval_only:
        model = build_model(cfg)
        checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR)
        loaded = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        checkpointer.check_complete()
        check_data(cfg, ("TEST",), loaded.get("classes") or None)
        check_registered_classes(cfg)
        return trainer_class.test(cfg, model)
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=args.resume)
    if comm.is_main_process():  # not before: an earlier run in the folder may not be continued so
        write_atomically(_config_path(cfg), cfg.dump())
    return trainer.train()


def run_script(
    main: Callable[[argparse.Namespace], object],
    description: str,
    epilog: str,
    prog: Optional[str] = None,
) -> None:
    """Parse the command line, call ``main(args)`` in each process, and exit.

    Exit status: 0 done; 2 bad input (one line on stderr); 75 stopped on request (if it was
    training, with a checkpoint); 130 interrupted twice; 1 anything else.
    """
    parser = default_argument_parser(epilog=epilog)
    parser.description, parser.prog = description, prog or parser.prog
    args = parser.parse_args()
    under_torchrun = "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ
    try:
        if under_torchrun:
            _run_under_torchrun(main, args)
        elif args.num_gpus * args.num_machines > 1:
            if args.num_machines == 1 and args.dist_url == parser.get_default("dist_url"):
                # two runs on one machine must not use the same port
                args.dist_url = f"tcp://127.0.0.1:{_find_free_port()}"
            _launch(main, args)
        else:
            handle_signals("alone")
            _call(main, args)
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


# -- several processes ----------------------------------------------------------------------------


def _launch(main, args) -> None:
    """Detectron2's ``launch``, except that MODEL.DEVICE decides between CPU and GPUs."""
    device = _device_of_group(args, args.num_gpus)
    handle_signals("launcher")
    # PyTorch reports each rank that it ends; our error should be the last line
    logging.getLogger("torch.multiprocessing.spawn").addFilter(
        lambda record: not str(record.msg).startswith("Terminating process")
    )
    start_processes(_worker, (main, args, device), nprocs=args.num_gpus)


def _worker(local_rank: int, main, args, device: str) -> None:
    die_with_parent()
    _join_group(
        device,
        local_rank,
        args.num_gpus,
        init_method=args.dist_url,
        rank=args.machine_rank * args.num_gpus + local_rank,
        world_size=args.num_machines * args.num_gpus,
    )
    handle_signals("worker")
    _call(main, args)


def _run_under_torchrun(main, args) -> None:
    die_with_parent()
    handle_signals("alone")
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and not args.resume and not args.eval_only:
        raise NATSError(
            "torchrun --max-restarts also needs --resume: a restart would find the checkpoints of "
            "an earlier run. Without any, --resume starts from the beginning"
        )
    local_rank, processes = (int(os.environ[key]) for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    device = _device_of_group(args, processes)
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps this store over a restart. Without a prefix of its own, the new group would
        # find the addresses of the dead one.
        store = PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    _join_group(device, local_rank, processes, store=store, rank=rank, world_size=world_size)
    _call(main, args)


def _device_of_group(args, processes: int) -> str:
    """MODEL.DEVICE, if this machine has enough of it for its processes."""
    device = load_config(args.config_file, args.opts).MODEL.DEVICE
    if device.startswith("cuda"):
        here = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if here < processes:
            reason = "" if here else f" ({_why_no_cuda()})"
            raise NATSError(
                f"processes on this machine: {processes}, GPUs that PyTorch can use here: {here}"
                f"{reason}. Start fewer, or add MODEL.DEVICE cpu to compute on the CPU"
            )
    return device


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


def _why_no_cuda() -> str:
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


# -- leaving --------------------------------------------------------------------------------------


def _call(main, args) -> None:
    status = 0
    try:
        main(args)
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
