#!/usr/bin/env python
"""What a wider field gains, drawn without a search and searched. Takes minutes on two CPU cores.

registers: columns of tables on pages of old registers, real images. They are taller than what the
plain detector sees. All methods get about the same time.
bars: drawn horizontal bars, whose class is told by the colours of both ends. The plain detector
cannot see both ends at once. So the right answer of the search is known.

Each command is printed before it runs, and can be run again.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, NamedTuple, Sequence

from tabulate import tabulate

WARM = "searched, from the super-network's weights"


class Example(NamedTuple):
    """What is compared on some data; its configs are configs/quickstart/NAME and NAME_search.

    Attributes:
        schedule: of the detectors that need no search, so that all take about the same time.
        draws: row of the table → options of nats-draw.
        right: what a search should find.
        threshold: lowest score of a detection in the picture.
    """

    schedule: Sequence[str]
    draws: dict
    right: str
    threshold: float


EXAMPLES = {
    "registers": Example(
        ["SOLVER.MAX_ITER", "550", "SOLVER.STEPS", "(440,)"],
        {
            "drawn: random dilations": ["--random"],
            "drawn: (5, 1) everywhere, as nats-look says": ["--uniform", "5x1"],
        },
        "Columns are tall: dilations along the height are right, such as 5x1.",
        0.5,
    ),
    "bars": Example(
        [],
        {"drawn: random dilations": ["--random"]},
        "The bars are horizontal, and three times as long as what the detector sees: 1x3 is right.",
        0.3,  # the scores of the plain detector are low
    ),
}


def run(command: Sequence[str], log: str = "") -> str:
    """Print and run a command of the project; returns what it printed.

    Args:
        log: a file for its output, which else is shown.
    """
    print(f"$ {shlex.join(command)}", flush=True)
    start, program = time.perf_counter(), Path(sys.executable).with_name(command[0])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", program, *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if log else None,
        text=True,
    )
    if log:
        os.makedirs(os.path.dirname(log), exist_ok=True)
        Path(log).write_text(done.stdout)
        print(f"{time.perf_counter() - start:.0f} s: {log}", flush=True)
    else:
        print(done.stdout, flush=True)
    if done.returncode:
        sys.exit(f"error: {command[0]} failed" + (f": see the end of {log}" if log else ""))
    return done.stdout


def train(config: str, folder: str, *options: str, command: str = "nats-train") -> None:
    words = [command, "--config-file", config, "OUTPUT_DIR", folder, *options]
    run(words, os.path.join(folder, "console.txt"))


def sees(report: str) -> str:
    """The height × width that the level which sees furthest sees, by nats-look's report."""
    sizes = re.findall(r"^\S+ +((?:over )?\d+) +((?:over )?\d+)$", report, re.MULTILINE)
    return " × ".join(max(sizes, key=lambda size: [int(side.split()[-1]) for side in size]))


def row(name: str, folder: str, report: str) -> List[str]:
    """The table's row of what was trained in a folder.

    Args:
        report: what nats-look says of it.
    """
    from detectron2.modeling import build_backbone
    from detectron2_nats.config import load_config
    from detectron2_nats.show import backbone_cost

    lines = map(json.loads, Path(folder, "metrics.json").read_text().splitlines())
    metrics = [line for line in lines if "bbox/AP" in line][-1]
    cfg = load_config(os.path.join(folder, "config.yaml"))
    cost = backbone_cost(build_backbone(cfg), *2 * [-(-cfg.INPUT.MIN_SIZE_TEST // 32) * 32])
    numbers = [f"{metrics['bbox/AP']:.1f}", f"{metrics['bbox/AP50']:.1f}"]
    return [name, sees(report), *numbers, f"{cost.parameters:,}", f"{cost.flops / 1e6:,.1f}"]


def table(rows: List[List[str]]) -> str:
    headers = ["", "sees, px", "AP", "AP50", "parameters", "MFLOPs"]
    align = ["left", *["right"] * 5]
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=align)


def main(name: str, output: str) -> None:
    start, example = time.perf_counter(), EXAMPLES[name]
    config, search = (f"configs/quickstart/{name}{end}.yaml" for end in ("", "_search"))
    print(f"{__doc__.split(f'{name}: ')[1].split('. ')[0].capitalize()}. All output: {output}\n")
    shutil.rmtree(output, ignore_errors=True)
    run(["nats-look", config, "--output", f"{output}/pictures"])
    folders = {"plain": f"{output}/plain"}
    for number, (title, options) in enumerate(example.draws.items()):
        folders[title] = f"{output}/drawn_{number}"
        run(["nats-draw", "--config-file", search, *options, "--output", folders[title]])
    *unsearched, searched = {**folders, WARM: f"{output}/searched"}.values()
    folders[WARM] = searched

    def search_and_train() -> None:
        options = ["SEARCH.RETRAIN_WEIGHTS", "supernet"]
        train(search, f"{output}/search", *options, command="nats-search")
        train(f"{output}/search/retrain.yaml", searched)

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        runs = [pool.submit(search_and_train)]
        for folder in unsearched:
            drawn = f"{folder}/retrain.yaml"
            start_from = drawn if os.path.isfile(drawn) else config
            runs.append(pool.submit(train, start_from, folder, *example.schedule))
        for ended in runs:
            ended.result()
    reports = [
        run(
            ["nats-look", f"{folder}/config.yaml", f"{folder}/model_final.pth"],
            f"{folder}/look.txt",
        )
        for folder in folders.values()
    ]
    rows = [row(*parts) for parts in zip(folders, folders.values(), reports)]
    print(f"\n{table(rows)}\n\nParameters and FLOPs are the backbone's, of one square image.")
    draw(example, output, folders)
    print(f"{time.perf_counter() - start:.0f} s in total")


def draw(example: Example, output: str, folders: dict) -> None:
    """Print what was found, and draw it and what two detectors detect."""
    from detectron2_nats import Architecture
    from detectron2_nats.show import pictures
    from detectron2_nats.show.detectors import detections_figure

    architecture = Architecture.load(f"{output}/search/architecture.yaml")
    shares = ", ".join(f"{h}x{w} {share:.0%}" for (h, w), share in architecture.shares().items())
    print(f"{example.right}\nThe search chose: {shares}. One seed: a few AP are chance.\n")
    pair = {
        key: [f"{folder}/config.yaml", f"{folder}/model_final.pth"]
        for key, folder in (("plain", folders["plain"]), ("searched", folders[WARM]))
    }
    options = {"images": 2, "threshold": example.threshold, "dataset": "", "opts": [], "title": ""}
    figures = {
        "architecture": pictures.plot_architecture(architecture),
        "detections": detections_figure(argparse.Namespace(**pair, **options)),
    }
    for name, figure in figures.items():
        pictures.save(figure, f"{output}/pictures", name, ["png"])
    for name in ("look", *figures):
        print(f"wrote {output}/pictures/{name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "example", nargs="?", choices=EXAMPLES, default="registers", help="(%(default)s)"
    )
    parser.add_argument("--output", default="output/demo", help="emptied first (%(default)s)")
    args = parser.parse_args()
    main(args.example, args.output)
