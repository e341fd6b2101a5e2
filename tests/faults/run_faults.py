#!/usr/bin/env python
"""Break small runs in many ways, start them again, and compare their ends with undisturbed runs.

Survived: the run ended after being started with --resume, and said what the manual says it says.
Identical: weights, α, both optimizers, random states and architecture are equal bit for bit.
"""

import argparse
import datetime
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runs import REPOSITORY, TINY, assert_same_run, printed, script  # noqa: E402

EPILOG = """
examples:
  all kinds, about an hour on two CPU cores:
    $ python tests/faults/run_faults.py --seed 0 --faults 100 --output output/fault_table.md
  some:
    $ python tests/faults/run_faults.py --faults 4 --kinds SIGKILL "full disk"
exit status: 0 all survived and identical, 1 otherwise.
"""

ITERATIONS = 12
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")


class NotSurvived(Exception):
    """What a run did that it must not do."""


class NothingTried(Exception):
    """The run had ended before the fault came, or had not what it breaks."""


def expect(condition, message: str, output: str = "") -> None:
    if not condition:
        raise NotSurvived(message + (f":\n{output[-2000:]}" if output else ""))


class Bench:
    """Starts searches in numbered folders, and keeps the undisturbed ones to compare with."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.config = folder / "tiny.yaml"
        self.config.write_text(TINY)
        self._count = itertools.count()
        self._references: Dict[str, Path] = {}
        self._children: List[subprocess.Popen] = []

    def new_folder(self, name: str = "run") -> Path:
        folder = self.folder / f"{next(self._count)}_{name}"
        folder.mkdir()
        return folder

    def start(
        self,
        folder: Path,
        *opts,
        name="search_net.py",
        ranks=1,
        faults=None,
        launcher=None,
        env=None,
    ):
        """A run that goes on from what lies in `folder`, in a process group of its own."""
        arguments = ["--config-file", str(self.config), "--resume"]
        if ranks > 1 and launcher is None:
            arguments += ["--num-gpus", str(ranks)]
        arguments += ["OUTPUT_DIR", str(folder), "SOLVER.MAX_ITER", str(ITERATIONS), *opts]
        environment = dict(env or {})
        if faults:
            environment["FAULTS"] = json.dumps(faults)
            arguments, name = [name, *arguments], "tests/faults/faulty.py"
        process = script(
            name, *arguments, env=environment, start_new_session=True, launcher=launcher or ()
        )
        self._children.append(process)
        return process

    def end(self, process, timeout: float = 180) -> str:
        """Wait for a process; returns its output."""
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            kill_group(process)
            raise NotSurvived(f"no end after {timeout} s:\n{printed(process)[-2000:]}") from None
        return printed(process)

    def go_on(self, folder: Path, *opts, **kwargs) -> str:
        process = self.start(folder, *opts, **kwargs)
        output = self.end(process)
        expect(process.returncode == 0, f"exit status {process.returncode} on resume", output)
        return output

    def reference(self, key: str = "1", *opts, ranks=1, **kwargs) -> Path:
        """The folder of a run that nothing happens to, made once."""
        if key not in self._references:
            folder = self.new_folder("undisturbed")
            process = self.start(folder, *opts, ranks=ranks, **kwargs)
            output = self.end(process)
            expect(process.returncode == 0, "the undisturbed run failed", output)
            (folder / "output.txt").write_text(output)
            self._references[key] = folder
        return self._references[key]

    def wait_at_random(self, process) -> str:
        """Until some moment of the training, before its last iteration; says which."""
        done, delay = self.random.randrange(ITERATIONS - 1), self.random.uniform(0, 0.15)
        wait_for_training(process, done)
        time.sleep(delay)
        if process.poll() is not None:
            raise NothingTried
        return f"{delay:.2f} s after {done} iterations"

    def clean_up(self) -> None:
        for process in self._children:
            if process.poll() is None:
                kill_group(process)


def kill_group(process, number: int = signal.SIGKILL) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass
    if number == signal.SIGKILL:
        process.wait()


def wait_for_training(process, iterations: int, timeout: float = 120) -> None:
    """Until so many iterations are done (each logs a line)."""
    deadline = time.monotonic() + timeout
    while True:
        output = printed(process)
        started = "Starting training from iteration" in output
        if started and output.count(" iter: ") >= iterations:
            return
        expect(process.poll() is None, "it ended before its time", output)
        expect(time.monotonic() < deadline, "it does not train", output)
        time.sleep(0.01)


def children_of(process) -> List[int]:
    """Ranks or loader processes; not Python's resource tracker."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = [int(child) for child in path.read_text().split()]
    commands = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children]
    return [child for child, c in zip(children, commands) if b"resource_tracker" not in c]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# -- the faults: (bench) → (what was done, disturbed folder, undisturbed folder) ------------------


def sigkill(bench: Bench, *opts, ranks: int = 1, **script):
    key = " ".join([str(ranks), *script.values()])
    reference = bench.reference(key, *opts, ranks=ranks, **script)
    folder = bench.new_folder()
    process = bench.start(folder, *opts, ranks=ranks, **script)
    moment = bench.wait_at_random(process)
    kill_group(process)
    bench.go_on(folder, *opts, ranks=ranks, **script)
    return f"killed {moment}", folder, reference


def sigkill_retraining(bench: Bench, ranks: int = 1):
    opts = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.NORM", "SyncBN")
    return sigkill(bench, *opts, ranks=ranks, name="train_net.py")


def launcher_killed(bench: Bench):
    reference, folder = bench.reference("2", ranks=2), bench.new_folder()
    process = bench.start(folder, "DATALOADER.NUM_WORKERS", "2", ranks=2)
    moment = bench.wait_at_random(process)
    ranks = children_of(process)
    expect(len(ranks) == 2, f"expected two ranks, found {ranks}", printed(process))
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while any(map(lives, ranks)):
        expect(time.monotonic() < deadline, "the ranks outlive their launcher", printed(process))
        time.sleep(0.05)
    bench.go_on(folder, ranks=2)
    return f"killed {moment}", folder, reference


def rank_fails(bench: Bench, fault: str, status: int, words: str):
    """On one of two ranks, at the start of a step's forward pass."""
    reference, folder = bench.reference("2", ranks=2), bench.new_folder()
    where = [bench.random.randrange(2), bench.random.randrange(ITERATIONS)]
    process = bench.start(folder, ranks=2, faults={fault: where})
    output = bench.end(process)
    expect(process.returncode == status, f"exit status {process.returncode}", output)
    expect(words in output, "no clear error", output)
    bench.go_on(folder, ranks=2)
    return f"[rank, iteration] {where}", folder, reference


def rank_out_of_memory(bench: Bench):
    return rank_fails(bench, "out_of_memory", 1, "can't allocate memory")


def rank_diverged(bench: Bench):
    return rank_fails(bench, "diverged", 2, "step is not finite, Predicted boxes or scores")


def evaluation_killed(bench: Bench):
    ranks = bench.random.choice([1, 2])
    reference, folder = bench.reference(str(ranks), ranks=ranks), bench.new_folder()
    opts = ["TEST.EVAL_PERIOD", "3", "DATASETS.TEST", "('nats_embedded_val',)"]
    process = bench.start(folder, *opts, ranks=ranks)
    deadline = time.monotonic() + 120
    while "Start inference on" not in printed(process):
        expect(process.poll() is None, "it ended before its time", printed(process))
        expect(time.monotonic() < deadline, "it does not evaluate", printed(process))
        time.sleep(0.01)
    delay = bench.random.uniform(0, 1)
    time.sleep(delay)
    if process.poll() is not None:
        raise NothingTried
    kill_group(process)
    bench.go_on(folder, *opts, ranks=ranks)
    return f"ranks: {ranks}, killed {delay:.2f} s after the evaluation's start", folder, reference


def stop_signal(bench: Bench, ranks: int = 1):
    """To all processes, as schedulers send it, loader processes too."""
    reference, folder = bench.reference(str(ranks), ranks=ranks), bench.new_folder()
    number = bench.random.choice([signal.SIGTERM, signal.SIGUSR1])
    workers = ["DATALOADER.NUM_WORKERS", str(bench.random.choice([0, 2]))]
    process = bench.start(folder, *workers, ranks=ranks)
    moment = bench.wait_at_random(process)
    kill_group(process, number)
    output = bench.end(process)
    # 0: the last step was already taken
    expect(process.returncode in (75, 0), f"status {process.returncode} on {number.name}", output)
    if process.returncode == 75:
        expect("stopped on request after iteration" in output, "it does not say so", output)
        bench.go_on(folder, *workers, ranks=ranks)
    return f"{number.name} {moment}, status {process.returncode}", folder, reference


def rank_dead(bench: Bench):
    reference, folder = bench.reference("2", ranks=2), bench.new_folder()
    process = bench.start(folder, launcher=(*TORCHRUN, "--max-restarts", "2"))
    moment = bench.wait_at_random(process)
    ranks = children_of(process)
    expect(len(ranks) == 2, f"expected two ranks, found {ranks}", printed(process))
    rank = bench.random.randrange(2)
    os.kill(ranks[rank], signal.SIGKILL)
    output = bench.end(process)
    expect(process.returncode == 0, f"torchrun ended with {process.returncode}", output)
    return f"rank {rank} killed {moment}", folder, reference


def loader_dead(bench: Bench):
    reference, folder = bench.reference(), bench.new_folder()
    process = bench.start(folder, "DATALOADER.NUM_WORKERS", "2")
    moment = bench.wait_at_random(process)
    loaders = children_of(process)
    if not loaders:  # not yet started
        kill_group(process)
        raise NothingTried
    os.kill(bench.random.choice(loaders), signal.SIGKILL)
    output = bench.end(process)
    # 0: its last batches were already handed over
    expect(process.returncode in (0, 1), f"exit status {process.returncode}", output)
    bench.go_on(folder, "DATALOADER.NUM_WORKERS", "2")
    return f"killed {moment}, status {process.returncode}", folder, reference


def damaged_checkpoint(bench: Bench, damage: Callable[[bytearray], str]):
    """A copy of the undisturbed folder as it was some checkpoints ago, its newest one damaged."""
    reference, folder = bench.reference(), bench.new_folder()
    shutil.copytree(reference, folder, dirs_exist_ok=True)
    names = sorted(path.name for path in folder.glob("model_*.pth"))  # model_final is the last
    newest = bench.random.randrange(1, len(names))
    for name in [*names[newest + 1 :], "architecture.yaml", "retrain.yaml"]:
        (folder / name).unlink()
    (folder / "last_checkpoint").write_text(names[newest])
    path = folder / names[newest]
    content = bytearray(path.read_bytes())
    done = damage(content)
    path.write_bytes(content)
    output = bench.go_on(folder)
    expect(f"checkpoint {path} is damaged" in output, "the damaged file is not named", output)
    return f"{names[newest]} {done}", folder, reference


def truncated(bench: Bench):
    def damage(content):
        del content[bench.random.randrange(len(content)) :]
        return f"cut to {len(content)} bytes"

    return damaged_checkpoint(bench, damage)


def flipped(bench: Bench):
    def damage(content):
        # inside the tensors: between them lies padding, where a flip does no harm
        start, end = len(content) // 10, len(content) * 9 // 10
        for _ in range(3):
            content[bench.random.randrange(start, end)] ^= 1 << bench.random.randrange(8)
        return "with three bits flipped"

    return damaged_checkpoint(bench, damage)


def full_disk(bench: Bench):
    reference, folder = bench.reference(), bench.new_folder()
    number = bench.random.randrange(ITERATIONS // 2)
    process = bench.start(folder, faults={"full_disk": number})
    output = bench.end(process)
    expect(process.returncode == 2, f"status {process.returncode} on a full disk", output)
    last = output.strip().splitlines()[-1]
    expect("could not be written" in last and "No space left" in last, "no clear error", output)
    litter = [path.name for path in folder.glob(".*") if path.name != ".lock"]
    expect(not litter, f"left over: {litter}")
    bench.go_on(folder)
    return f"at checkpoint {number}", folder, reference


def damaged_images(bench: Bench):
    """Compared with an undisturbed run on the same damaged images with no loader process."""
    data = bench.new_folder("data")
    whole = REPOSITORY / os.getenv("DETECTRON2_DATASETS", "datasets") / "nats_embedded"
    shutil.copytree(whole, data / whole.name, copy_function=os.link)
    damaged = 0
    for split in ("train", "calibration"):
        for path in sorted((data / whole.name / split).iterdir()):
            if bench.random.random() > 0.3:
                continue
            damaged += 1
            content, how = path.read_bytes(), bench.random.randrange(4)
            path.unlink()  # the original has another name too
            if how:
                half = content[: len(content) // 2]
                path.write_bytes([half, b"", bench.random.randbytes(500)][how - 1])
    env = {"DETECTRON2_DATASETS": str(data)}
    opts = ["RUN.MAX_BAD_DATA", "0.5"]
    reference = bench.reference(str(data), *opts, env=env)
    expect("skipping image" in (reference / "output.txt").read_text(), "none was skipped")
    folder = bench.new_folder()
    opts += ["DATALOADER.NUM_WORKERS", "2"]
    process = bench.start(folder, *opts, env=env)
    moment = bench.wait_at_random(process)
    kill_group(process)
    bench.go_on(folder, *opts, env=env)
    return f"{damaged} images damaged, and SIGKILL {moment}", folder, reference


def nan_loss(bench: Bench):
    """It ends the run before it does harm; without it, the run goes on."""
    reference, folder = bench.reference(), bench.new_folder()
    step = bench.random.randrange(2)
    first = round(0.34 * ITERATIONS) if step else 0
    where = [bench.random.randrange(first, ITERATIONS), step]
    process = bench.start(folder, faults={"nan": [where]})
    output = bench.end(process)
    expect(process.returncode == 2, f"exit status {process.returncode}", output)
    words = f"iteration {where[0]}: the loss or gradient of the {['weight', 'alpha'][step]} step is"
    expect(words in output.strip().splitlines()[-1], "no clear error", output)
    for path in folder.glob("model_*.pth"):
        saved = torch.load(path, weights_only=True)["model"]
        expect(all(v.isfinite().all() for v in saved.values()), f"{path} is not finite")
    bench.go_on(folder)
    return f"[iteration, step] {where}", folder, reference


KINDS = {
    "SIGKILL": sigkill,
    "newest checkpoint truncated": truncated,
    "bits flipped in the newest checkpoint": flipped,
    "SIGTERM or SIGUSR1": stop_signal,
    "full disk": full_disk,
    "NaN loss": nan_loss,
    "one rank dead, torchrun restarts": rank_dead,
    "damaged images": damaged_images,
    "SIGKILL, two ranks": partial(sigkill, ranks=2),
    "SIGTERM or SIGUSR1, two ranks": partial(stop_signal, ranks=2),
    "loader process dead": loader_dead,
    "launcher killed, two ranks": launcher_killed,
    "a rank out of memory": rank_out_of_memory,
    "a rank diverges": rank_diverged,
    "SIGKILL of a retraining": sigkill_retraining,
    "SIGKILL of a retraining, two ranks": partial(sigkill_retraining, ranks=2),
    "SIGKILL in an evaluation": evaluation_killed,
}


def inject(bench: Bench, kind: str):
    """→ (survived, identical, what was done or went wrong)."""
    while True:
        try:
            done, folder, reference = KINDS[kind](bench)
            break
        except NothingTried:
            pass
        except NotSurvived as error:
            return False, False, str(error)
    try:
        assert_same_run(reference, folder)
    except AssertionError as difference:
        return True, False, f"{done}; differs in {difference}; see {folder} and {reference}"
    return True, True, done


def table(results: Dict[str, list], seed: int) -> str:
    tried = sum(map(len, results.values()))
    lines = [
        f"`python tests/faults/run_faults.py --seed {seed} --faults {tried}`, "
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores, PyTorch {torch.__version__}",
        "",
        "| Kind | Tried | Survived | Identical to the undisturbed run |",
        "| --- | ---: | ---: | ---: |",
    ]
    results = {**results, "**all**": [o for outcomes in results.values() for o in outcomes]}
    for kind, outcomes in results.items():
        survived, identical = (sum(column) for column in zip(*outcomes))
        lines.append(f"| {kind} | {len(outcomes)} | {survived} | {identical} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is broken when (default 0)")
    parser.add_argument(
        "--faults", type=int, default=100, help="how many, of each kind in turn (default 100)"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=f"{[*KINDS]}"
    )
    parser.add_argument("--output", help="write the Markdown table to this file too")
    args = parser.parse_args()

    from detectron2_nats.toy.sets import ensure_embedded_dataset

    os.chdir(REPOSITORY)
    ensure_embedded_dataset()
    folder = Path(tempfile.mkdtemp(prefix="faults_"))
    bench = Bench(folder, args.seed)
    results: Dict[str, list] = {}
    good = True
    try:
        for number, kind in zip(range(1, args.faults + 1), itertools.cycle(args.kinds)):
            survived, identical, what = inject(bench, kind)
            results.setdefault(kind, []).append((survived, identical))
            good = good and survived and identical
            verdict = ("identical" if identical else "DIFFERS") if survived else "NOT SURVIVED"
            print(f"[{number}/{args.faults}] {kind}: {verdict}: {what}", flush=True)
    finally:
        bench.clean_up()
        if good:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"the runs are kept in {folder}")
    text = table(results, args.seed)
    print("\n" + text)
    if args.output:
        Path(args.output).write_text(text)
        print(f"wrote {args.output}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
