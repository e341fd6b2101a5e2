#!/usr/bin/env python
"""Run the tests that need a GPU, then the benchmark on the GPU, and write one report."""

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from typing import List, Tuple

import torch
from tabulate import tabulate

from detectron2_nats.commands.cli import whole_number
from detectron2_nats.files import write_atomically

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir)
EPILOG = """
example:
  $ python tools/gpu_report.py --output output/gpu.md
Without a GPU everything is skipped, and the report says so.
exit status: 0 nothing failed, 1 something failed.
"""
BENCHMARK = (
    "--device cuda --dtype bfloat16 float32 --what train inference memory convs "
    "--networks R50 --size 800 1200"
)


def run_tests(folder: str) -> Tuple[bool, str]:
    """Run the GPU tests; returns whether none failed, and a table of the results."""
    path = os.path.join(folder, "tests.xml")
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    status = subprocess.run([*command, f"--junitxml={path}"], cwd=ROOT).returncode
    rows: List[Tuple[str, str]] = []
    for case in ElementTree.parse(path).iter("testcase"):
        faults = [child for child in case if child.tag in ("failure", "error", "skipped")]
        words = [f"{f.tag}: {' '.join(f.get('message', '').split())[:150]}" for f in faults]
        rows.append((case.get("name"), "; ".join(words).replace("|", r"\|") or "passed"))
    return status == 0, tabulate(rows, ["test", "result"], "github")


def run_benchmark(folder: str, batch: int) -> Tuple[bool, str]:
    """Run the benchmark; returns whether it ended well, and the tables that it has written."""
    path = os.path.join(folder, "benchmark.md")
    command = [sys.executable, "-W", "ignore", "tools/benchmark.py", *BENCHMARK.split()]
    command += ["--batch", str(batch), "--output", path]
    failed = subprocess.run(command, cwd=ROOT).returncode != 0
    tables = ""
    if os.path.isfile(path):
        with open(path) as file:
            tables = file.read()
    return not failed, tables + "\nThe benchmark failed: see its output." * failed


def main(args: argparse.Namespace) -> int:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    head = f"{datetime.date.today()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}"
    with tempfile.TemporaryDirectory() as folder:
        tested, tests = run_tests(folder)
        measured, benchmark = True, "Skipped: no usable CUDA."
        if torch.cuda.is_available():
            measured, benchmark = run_benchmark(folder, args.batch)
    text = f"# On a GPU\n\n{head}; GPUs: {', '.join(gpus) or 'none'}\n\n"
    text += f"## Tests\n\n{tests}\n\n## Benchmark\n\n{benchmark.strip()}\n"
    write_atomically(args.output, text)
    print(f"{text}\nwrote {args.output}")
    return 0 if tested and measured else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", default="output/gpu.md", metavar="FILE.md", help="report to write (%(default)s)"
    )
    parser.add_argument(
        "--batch", type=whole_number(16384), default=8, help="images at a time (%(default)s)"
    )
    sys.exit(main(parser.parse_args()))
