#!/usr/bin/env python
"""What a wider field gains, drawn without a search and searched. Takes minutes on two CPU cores.

registers: columns of tables on pages of old registers. They are taller than what the plain detector
sees. All methods get about the same time.
bars: drawn horizontal bars, whose class is told by the colours of both ends. The plain detector
cannot see both ends at once. So the right answer of the search is known.

Each command is printed before it runs.
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
from typing import List, Mapping, NamedTuple, Sequence

from tabulate import tabulate


class Example(NamedTuple):
    """What is compared with the configs NAME and NAME_search of configs/quickstart.

    Attributes:
        draws: row of the table → options of nats-draw.
        schedule: of what needs no search, so that all take about the same time.
        threshold: lowest score of a detection in the picture.
        answer: what a search should find.
    """

    draws: Mapping[str, Sequence[str]]
    schedule: Sequence[str]
    threshold: str
    answer: str


HEADERS = ["", "sees, px", "AP", "AP50", "parameters", "MFLOPs"]
RANDOM = {"drawn: random dilations": ["--random"]}
EXAMPLES = {
    "registers": Example(
        {**RANDOM, "drawn: (5, 1) everywhere, as nats-look says": ["--uniform", "5x1"]},
        ["SOLVER.MAX_ITER", "550", "SOLVER.STEPS", "(440,)"],
        "0.5",
        "Columns are tall: dilations along the height are right, such as 5x1.",
    ),
    "bars": Example(
        RANDOM, [], "0.3", "The bars are horizontal, and longer than what is seen: 1x3 is right."
    ),
}


def run(*command: str, log: str = "") -> None:
    """Print and run a command of the project.

    Args:
        log: a file for what it prints, which else is shown.
    """
    print(f"$ {shlex.join(command)}", flush=True)
    start, program = time.perf_counter(), Path(sys.executable).with_name(command[0])
    words = [sys.executable, "-W", "ignore", str(program), *command[1:]]
    if log:
        os.makedirs(os.path.dirname(log), exist_ok=True)
        with open(log, "w") as file:
            # two at a time, which must not share the cores' threads
            environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2)), **os.environ}
            pipes = {"stdout": file, "stderr": subprocess.STDOUT}
            status = subprocess.run(words, env=environment, **pipes).returncode
        print(f"{time.perf_counter() - start:.0f} s: {log}", flush=True)
    else:
        status = subprocess.run(words).returncode
    if status:
        sys.exit(f"{command[0]} failed" + (f": see the end of {log}" if log else ""))


def train(config: str, folder: str, *options: str, command: str = "nats-train") -> None:
    words = ["--config-file", config, "OUTPUT_DIR", folder, *options]
    run(command, *words, log=f"{folder}/console.txt")


def train_all(name: str, example: Example, output: str) -> Mapping[str, str]:
    """Train all methods, two at a time; returns row of the table → folder."""
    plain, search = (f"configs/quickstart/{name}{kind}.yaml" for kind in ("", "_search"))
    configs = {"plain": plain}
    folders = {"plain": f"{output}/plain"}
    for number, (method, options) in enumerate(example.draws.items(), 1):
        folders[method] = f"{output}/drawn_{number}"
        run("nats-draw", "--config-file", search, *options, "--output", folders[method])
        configs[method] = f"{folders[method]}/retrain.yaml"

    def search_and_train(folder: str) -> None:
        weights = ["SEARCH.RETRAIN_WEIGHTS", "supernet"]
        train(search, f"{output}/search", *weights, command="nats-search")
        train(f"{output}/search/retrain.yaml", folder)

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        runs = [pool.submit(search_and_train, f"{output}/searched")]
        for method, config in configs.items():
            runs.append(pool.submit(train, config, folders[method], *example.schedule))
        for ended in runs:
            ended.result()
    return {**folders, "searched, from the super-network's weights": f"{output}/searched"}


def sees(report: str) -> str:
    """The height × width that the level which sees furthest sees, by nats-look's report."""
    sizes = re.findall(r"^\S+ +((?:over )?\d+) +((?:over )?\d+)$", report, re.MULTILINE)
    return " × ".join(max(sizes, key=lambda size: [int(side.split()[-1]) for side in size]))


def row(method: str, folder: str) -> List[str]:
    """The table's row of what was trained in a folder."""
    from detectron2.data import DatasetCatalog
    from detectron2.modeling import build_backbone
    from detectron2_nats.config import load_config
    from detectron2_nats.show.cost import backbone_cost

    config, weights = f"{folder}/config.yaml", f"{folder}/model_final.pth"
    run("nats-look", config, weights, log=f"{folder}/look.txt")
    lines = map(json.loads, Path(folder, "metrics.json").read_text().splitlines())
    metrics = [line for line in lines if "bbox/AP" in line][-1]
    cfg = load_config(config)
    image = DatasetCatalog.get(cfg.DATASETS.TEST[0])[0]
    size = (-(-image[side] // 32) * 32 for side in ("height", "width"))
    cost = backbone_cost(build_backbone(cfg), *size)
    numbers = [f"{metrics['bbox/AP']:.1f}", f"{metrics['bbox/AP50']:.1f}"]
    numbers += [f"{cost['parameters']:,}", f"{cost['FLOPs'] / 1e6:,.1f}"]
    return [method, sees(Path(folder, "look.txt").read_text()), *numbers]


def main(name: str, output: str) -> None:
    start, example, pictures = time.perf_counter(), EXAMPLES[name], f"{output}/pictures"
    shutil.rmtree(output, ignore_errors=True)
    run("nats-look", f"configs/quickstart/{name}.yaml", "--output", pictures)
    folders = train_all(name, example, output)
    rows = [row(method, folder) for method, folder in folders.items()]
    shown = ["--images", "2", "--threshold", example.threshold, "--output", pictures]
    run("nats-show", f"{output}/search", f"{output}/plain", f"{output}/searched", *shown)
    with open(f"{output}/table.json", "w") as file:
        json.dump([dict(zip(HEADERS, values)) for values in rows], file, indent=1)
    align = ["left", *["right"] * 5]
    print(f"\n{tabulate(rows, HEADERS, 'pipe', disable_numparse=True, colalign=align)}\n")
    print(f"{example.answer} One seed: a few AP are chance. All but AP is the backbone's.")
    print(f"{time.perf_counter() - start:.0f} s; pictures:", *sorted(Path(pictures).iterdir()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "example", nargs="?", choices=EXAMPLES, default="registers", help="(%(default)s)"
    )
    parser.add_argument("--output", default="output/demo", help="emptied first (%(default)s)")
    arguments = parser.parse_args()
    main(arguments.example, arguments.output)
