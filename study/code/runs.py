"""Run several searches and retrainings, some at a time, and note what each took."""

import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional, Sequence

import torch

from ...engine.processes import STOPPED_EXIT_CODE
from ...errors import NATSError
from ...files import write_atomically
from .metrics import last_metric


class RunFailed(NATSError):
    """A run ended with an error."""


@dataclass
class Task:
    """One run of a command.

    Attributes:
        role: "search" or "retraining"; runs of a role take about the same time.
        folder: its OUTPUT_DIR, named after method and seed.
        prepare: called before the start; returns the arguments of Python.
        after: runs that must be done before.
        slot: its place among the simultaneous runs; decides its GPUs.
    """

    role: str
    folder: str
    prepare: Callable[[], List[str]]
    after: List["Task"] = field(default_factory=list)
    slot: int = 0
    started: float = 0.0
    process: Optional[subprocess.Popen] = None

    @property
    def done(self) -> bool:
        return self.cost()["done"]

    @property
    def console(self) -> str:
        return os.path.join(self.folder, "console.txt")

    def cost(self) -> dict:
        """What it took so far, over all starts: {"seconds", "cpu_seconds", "done", "lost"}.

        lost: the number of starts of which nothing is known, because the study was killed.
        """
        path = os.path.join(self.folder, "cost.json")
        if not os.path.isfile(path):
            return {"seconds": 0, "cpu_seconds": 0, "done": False, "lost": 0}
        with open(path) as file:
            return {"lost": 0, **json.load(file)}

    def _write_cost(self, **changes) -> None:
        path = os.path.join(self.folder, "cost.json")
        write_atomically(path, json.dumps({**self.cost(), **changes}))

    def start(self, environment: Dict[str, str]) -> None:
        os.makedirs(self.folder, exist_ok=True)
        command = self.prepare()
        with open(self.console, "a") as log:
            log.write(f"$ {_as_typed(command)}\n")
            log.flush()
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
                start_new_session=True,  # Ctrl-C reaches it once, through us
                preexec_fn=_stop_with_parent if sys.platform.startswith("linux") else None,
            )
        self.started = time.perf_counter()
        self._write_cost(lost=self.cost()["lost"] + 1)  # until its end is seen

    def poll(self) -> Optional[int]:
        """The exit status if it has ended, else None. Its cost is then written to cost.json."""
        if self.process.returncode is not None:  # send_signal() has already read the status
            return self.process.returncode
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            return None
        code = os.waitstatus_to_exitcode(status)
        self.process.returncode = code
        cost = self.cost()
        self._write_cost(
            seconds=cost["seconds"] + time.perf_counter() - self.started,
            cpu_seconds=cost["cpu_seconds"] + usage.ru_utime + usage.ru_stime,
            done=code == 0,
            lost=cost["lost"] - 1,
        )
        return code


def _stop_with_parent() -> None:
    """When the study is killed, stop its runs: they must not continue beside those of a restart."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _as_typed(command: List[str]) -> str:
    """Arguments of Python as a user would type the command."""
    if command[0] == "-m":
        return " ".join([f"nats-{command[1].rpartition('.')[2]}", *command[2:]])
    return " ".join(["python", *command])


def run_tasks(tasks: Sequence[Task], jobs: int, gpus: int) -> None:
    """Run what is missing, `jobs` runs at a time, and print a line after each.

    Args:
        gpus: of each run.

    Raises:
        RunFailed: a run failed. The others were stopped with a checkpoint.
        KeyboardInterrupt: a run was stopped; so were the others.
    """
    waiting = [task for task in tasks if not task.done]
    total, running = len(tasks), []
    print(f"{total - len(waiting)} of {total} runs are done", flush=True)
    try:
        while waiting or running:
            for task in [t for t in waiting if all(a.done for a in t.after)]:
                if len(running) == jobs:
                    break
                task.slot = min(set(range(jobs)) - {t.slot for t in running})
                task.start(environment_of(task.slot, jobs, gpus))
                waiting.remove(task)
                running.append(task)
            for task in list(running):
                code = task.poll()
                if code is None:
                    continue
                running.remove(task)
                if code == STOPPED_EXIT_CODE:
                    raise KeyboardInterrupt  # somebody has stopped this run
                if code:
                    raise RunFailed(f"exit status {code}: see the end of {task.console}")
                number = total - len(waiting) - len(running)
                left = _time_left(tasks, waiting, running, jobs)
                print(f"[{number}/{total}] {_result(task)}{left}", flush=True)
            time.sleep(0.2)
    finally:
        for task in running:
            task.process.send_signal(signal.SIGTERM)  # it writes a checkpoint and exits
        for task in running:
            while task.poll() is None:
                time.sleep(0.2)


def environment_of(slot: int, jobs: int, gpus: int) -> Dict[str, str]:
    """The CPU cores and GPUs of one of the simultaneous runs, as environment variables."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        given = os.environ.get("CUDA_VISIBLE_DEVICES")  # numbers or UUIDs
        names = given.split(",") if given else [str(i) for i in range(count)]
        devices = [names[(slot * gpus + i) % count] for i in range(gpus)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return environment


def _result(task: Task) -> str:
    name = os.path.join(*os.path.normpath(task.folder).split(os.sep)[-2:])
    result = f"AP {last_metric(task.folder, 'bbox/AP'):.1f} " if task.role != "search" else ""
    return f"{name}: {result}in {task.cost()['seconds']:.0f} s"


def _time_left(tasks: Sequence[Task], waiting: List[Task], running: List[Task], jobs: int) -> str:
    times: Dict[str, List[float]] = {}
    for task in tasks:
        if task.done:
            times.setdefault(task.role, []).append(task.cost()["seconds"])
    overall = statistics.mean(t for values in times.values() for t in values)
    expected = {role: statistics.mean(values) for role, values in times.items()}
    left = sum(expected.get(task.role, overall) for task in waiting)
    for task in running:
        left += max(0.0, expected.get(task.role, overall) - time.perf_counter() + task.started)
    minutes = left / jobs / 60
    return f" (about {minutes:.0f} min left)" if minutes >= 1 else ""
