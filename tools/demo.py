#!/usr/bin/env python
"""A search whose right answer is known, and what it gains. Takes minutes on two CPU cores.

The images show horizontal bars. The colours of a bar's two ends determine its class. The plain
detector cannot see both ends at once. The search finds dilations with which it can. This is a
small study by nats-study.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time

from tabulate import tabulate

from detectron2_nats.bench.baselines import dilation_shares
from detectron2_nats.commands.cli import tool_parser
from detectron2_nats.method.architecture import Architecture

EPILOG = """
example:
  $ python tools/demo.py --output output/demo
"""

CONFIG = "configs/quickstart/bars.yaml"
METHODS = {  # name in the study → name in the table
    "plain": "plain",
    "random": "random dilations",
    "nats-voted": "searched",
    "nats-warm": "searched, from the super-network's weights",
}
WANTED = (1, 3)


def table(results: dict) -> str:
    rows = []
    for method, name in METHODS.items():
        result = results["methods"][method]
        row = [name, f"{result['AP'][0]:.1f}", f"{result['AP50'][0]:.1f}"]
        row += [f"{result['parameters']:,}", f"{result['flops'] / 1e6:,.1f}"]
        rows.append([*row, f"{result['milliseconds']:.1f}"])
    headers = ["", "AP", "AP50", "parameters", "MFLOPs", "ms per image"]
    align = ["left", *["right"] * 5]
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=align)


def sentence(results: dict) -> str:
    """What the search chose, and whether that is right."""
    found = Architecture.from_config(results["searches"]["nats"]["architectures"][0])
    (chosen, share), *_ = dilation_shares([found]).items()
    if chosen != WANTED:
        return (
            f"The search gave most channels ({share:.0%}) the dilation {chosen}. That is wrong: "
            f"the bars are horizontal and need {WANTED}."
        )
    return (
        f"The search gave {share:.0%} of res3's channels the dilation {chosen}: as high as before, "
        "three times\nas wide. That is right: the bars are horizontal, and longer than what the "
        "plain detector sees."
    )


def run(name: str, *arguments: str) -> None:
    """Run a command of the project. It prints its own progress and errors."""
    print(f"$ {shlex.join([name, *arguments])}", flush=True)
    command = os.path.join(os.path.dirname(sys.executable), name)
    status = subprocess.run([sys.executable, "-W", "ignore", command, *arguments]).returncode
    if status:
        sys.exit(status)


def main(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    shutil.rmtree(args.output, ignore_errors=True)
    plain, search, warm = (
        f"{args.output}/seed_0/{n}" for n in ("plain", "search-nats", "nats-warm")
    )
    study = ["--config-file", CONFIG, "--search-config", "configs/quickstart/bars_search.yaml"]
    study += ["--methods", *METHODS, "--seeds", "1", "--jobs", str(min(2, os.cpu_count() or 1))]
    run("nats-study", *study, "--output", args.output)
    pictures = ["--output", f"{args.output}/pictures", "--images", "2"]
    pictures += ["--threshold", "0.3"]  # the scores of the plain detector are low
    pictures += ["--plain", CONFIG, f"{plain}/model_final.pth"]
    pictures += ["--searched", f"{warm}/retrain.yaml", f"{warm}/model_final.pth"]
    run("nats-plot", search, *pictures)
    run("nats-look", CONFIG, f"{plain}/model_final.pth", "--output", f"{args.output}/pictures")
    run("nats-report", args.output, "--title", "Horizontal bars")
    with open(f"{args.output}/results.json") as file:
        results = json.load(file)
    print(f"\n{table(results)}\n\nParameters, FLOPs and time are the backbone's.")
    print(f"\n{sentence(results)}\n\n{time.perf_counter() - start:.0f} s in total")
    print(f"wrote {search}/architecture.yaml, {search}/retrain.yaml")
    print(f"a page to look at, and to send to others: {args.output}/report.html")


if __name__ == "__main__":
    parser = tool_parser(__doc__, EPILOG)
    parser.add_argument(
        "--output", default="output/demo", help="output folder, emptied first (%(default)s)"
    )
    main(parser.parse_args())
