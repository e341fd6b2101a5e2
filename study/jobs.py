"""Run trainings, some at a time, and note what each took."""

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, List, Sequence

import torch

from detectron2_nats import NATSError

STOPPED = 75
"""Exit status of a training that was told to stop, and goes on with --resume."""


@dataclass
class Job:
    """One training: a search, or that of a method's detector.

    Attributes:
        folder: its OUTPUT_DIR, in which console.txt and cost.json lie, too.
        prepare: called before its start; returns the words of its command.
        after: the jobs that must be done before.
    """

    folder: str
    prepare: Callable[[], List[str]]
    after: Sequence["Job"] = ()
    slot: int = field(default=0, init=False)
    """Its place among those that run at the same time."""

    @property
    def done(self) -> bool:
        return self.cost()["done"]

    def cost(self) -> Dict[str, float]:
        """What its starts took together. One that was killed with the study does not count."""
        path = Path(self.folder, "cost.json")
        if not path.is_file():
            return {"seconds": 0, "cpu_seconds": 0, "done": False}
        return json.loads(path.read_text())

    def start(self, environment: Dict[str, str]) -> None:
        os.makedirs(self.folder, exist_ok=True)
        command = self.prepare()
        with console(self.folder, command) as log:
            self._process = subprocess.Popen(
                program(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C reaches it once, through us
                preexec_fn=_stop_with_parent if sys.platform.startswith("linux") else None,
            )
        self._started = time.perf_counter()

    def ended(self) -> bool:
        """Whether it has ended. What it took is then in cost.json.

        Raises:
            NATSError: it failed.
            KeyboardInterrupt: somebody has stopped it.
        """
        pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
        if not pid:
            return False
        self._process.returncode = code = os.waitstatus_to_exitcode(status)
        cost = self.cost()
        cost["seconds"] += time.perf_counter() - self._started
        cost["cpu_seconds"] += usage.ru_utime + usage.ru_stime
        write(os.path.join(self.folder, "cost.json"), json.dumps({**cost, "done": code == 0}))
        if code == STOPPED:
            raise KeyboardInterrupt
        if code:
            raise failure(self.folder, code)
        return True

    def stop(self) -> None:
        """Let it write a checkpoint and exit; returns when it has."""
        os.kill(self._process.pid, signal.SIGTERM)
        try:
            while not self.ended():
                time.sleep(0.2)
        except (NATSError, KeyboardInterrupt):
            pass  # why all are stopped has been said


def program(command: Sequence[str]) -> List[str]:
    """The words that start a command of this Python's environment."""
    return [sys.executable, str(Path(sys.executable).with_name(command[0])), *command[1:]]


def console(folder: str, command: Sequence[str]):
    """The file to which a run in a folder prints; begins with its command."""
    log = open(os.path.join(folder, "console.txt"), "a")
    print("$", shlex.join(command), file=log, flush=True)
    return log


def call(folder: str, *command: str) -> None:
    """Run a command that takes seconds, such as nats-draw.

    Raises:
        NATSError: it failed.
    """
    with console(folder, command) as log:
        code = subprocess.run(program(command), stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise failure(folder, code)


def failure(folder: str, code: int) -> NATSError:
    path = Path(folder, "console.txt")
    last = path.read_text(errors="replace").splitlines()[-1]
    return NATSError(f"exit status {code}, see the end of {path}: {last}")


def write(path: str, text: str) -> None:
    """Write a file. A kill leaves the old or the new one."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(f"{path}.new").write_text(text)
    os.replace(f"{path}.new", path)


def run_jobs(jobs: Sequence[Job], at_once: int) -> None:
    """Run what is not done, `at_once` jobs at a time, and print a line after each.

    Raises:
        NATSError: one failed. The others were stopped with a checkpoint.
        KeyboardInterrupt: we or one of them were stopped; so were the others.
    """
    waiting: List[Job] = [job for job in jobs if not job.done]
    running: List[Job] = []
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done", flush=True)
    try:
        while waiting or running:
            ready = [job for job in waiting if all(other.done for other in job.after)]
            for job in ready[: at_once - len(running)]:
                job.slot = min({*range(at_once)} - {other.slot for other in running})
                job.start(environment(job.slot, at_once))
                waiting.remove(job)
                running.append(job)
            for job in [job for job in running if job.ended()]:
                running.remove(job)
                count = len(jobs) - len(waiting) - len(running)
                print(f"[{count}/{len(jobs)}] {job.folder}: {job.cost()['seconds']:.0f} s")
                sys.stdout.flush()
            time.sleep(0.2)
    finally:
        for job in running:
            if job._process.returncode is None:
                job.stop()


def environment(slot: int, at_once: int) -> Dict[str, str]:
    """The CPU cores and the GPU of one of the simultaneous runs, as environment variables."""
    threads = str(max(1, (os.cpu_count() or 1) // at_once))
    variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    variables["PYTHONWARNINGS"] = "ignore"
    if torch.cuda.is_available():
        every = ",".join(map(str, range(torch.cuda.device_count())))
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")  # numbers or UUIDs
        variables["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return variables


def _stop_with_parent() -> None:
    """When the study is killed, stop its runs: they must not continue beside those of a restart."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
