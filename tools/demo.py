#!/usr/bin/env python
"""What a wider field gains, drawn without a search and searched. Takes minutes on two CPU cores.

registers: columns of tables on pages of old registers, real images. They are taller than what the
plain detector sees. All methods get about the same time.
bars: drawn horizontal bars, whose class is told by the colours of both ends. The plain detector
cannot see both ends at once. So the right answer of the search is known.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from typing import Callable, Dict, Mapping, NamedTuple

from tabulate import tabulate

from detectron2_nats.commands.cli import tool_parser
from detectron2_nats.look.detector import Detector
from detectron2_nats.look.objects import evenly, image_on_input, normalised
from detectron2_nats.look.rule import furthest, look
from detectron2_nats.method.architecture import Architecture
from detectron2_nats.method.search_space import Dilation

EPILOG = """
examples:
  $ python tools/demo.py --output output/demo
  $ python tools/demo.py bars --output output/demo_bars
"""


class Example(NamedTuple):
    """What is compared on some data.

    Attributes:
        config: name of the detector's config; its search's is NAME_search.
        methods: name in the study → name in the table. The first is plain, the last searched.
        sentence: results → what came out.
        title: of the report.
        threshold: lowest score of a detection in the picture.
    """

    config: str
    methods: Mapping[str, str]
    sentence: Callable[[dict], str]
    title: str
    threshold: float


def shares(results: dict) -> Dict[Dilation, float]:
    """Each dilation's share of the channels in what the search found, largest first."""
    return Architecture.from_config(results["searches"]["nats"]["architectures"][0.shares()]
    )


def about_registers(results: dict) -> str:
    """Whether the search found the direction, and whether a draw does as well."""
    found = shares(results).items()
    height, width = (sum(share for d, share in found if d[axis] == 5) for axis in (0, 1))
    verdict = "has found" if height > width + 0.2 else "has not found"
    _, *draws, searched = (method["AP"][0] for method in results["methods"].values())
    gain = searched - max(draws)
    return (
        f"The search made {height:.0%} of res3's channels see far along the height and {width:.0%} "
        "along the width, where a\nrandom draw gives 40% each on average: it "
        f"{verdict} that columns are tall.\n"
        f"It is {abs(gain):.1f} AP {'ahead of' if gain >= 0 else 'behind'} the best draw, "
        "which needs no search. One seed: differences of a few AP are chance."
    )


def about_bars(results: dict) -> str:
    """What the search chose, and whether that is right."""
    wanted = (1, 3)
    (chosen, share), *_ = shares(results).items()
    if chosen != wanted:
        return (
            f"The search gave most channels ({share:.0%}) the dilation {chosen}. That is wrong: "
            f"the bars are horizontal and need {wanted}."
        )
    return (
        f"The search gave {share:.0%} of res3's channels the dilation {chosen}: as high as before, "
        "three times\nas wide. That is right: the bars are horizontal, and longer than what the "
        "plain detector sees."
    )


WARM = "searched, from the super-network's weights"
REGISTERS = Example(
    "registers",
    {
        "plain-2.2x": "plain",
        "random-2.2x": "drawn: random dilations",
        "5x1-2.2x": "drawn: (5, 1) everywhere, as nats-look says",
        "nats-warm": WARM,
    },
    about_registers,
    "Columns of registers",
    0.5,
)
BARS = Example(
    "bars",
    {"plain": "plain", "random": "random dilations", "nats-voted": "searched", "nats-warm": WARM},
    about_bars,
    "Horizontal bars",
    0.3,  # the scores of the plain detector are low
)
EXAMPLES = {example.config: example for example in (REGISTERS, BARS)}


def sees(folder: str) -> str:
    """How far the detector trained in a folder sees: height × width, px of its input."""
    detector = Detector(f"{folder}/config.yaml", f"{folder}/model_final.pth", [])
    records = evenly(detector.records(""), 8)
    inputs = [image_on_input(record, detector.size) for record in records]
    images = [normalised(image, *detector.normalisation) for image in inputs]
    levels = look(detector.backbone, images).levels
    return str(levels[furthest(levels)])


def table(example: Example, results: dict, fields: Mapping[str, str]) -> str:
    """One row for each method.

    Args:
        fields: method → how far it sees.
    """
    rows = []
    for method, name in example.methods.items():
        result = results["methods"][method]
        row = [name, fields[method], f"{result['AP'][0]:.1f}", f"{result['AP50'][0]:.1f}"]
        row += [f"{result['parameters']:,}", f"{result['flops'] / 1e6:,.1f}"]
        rows.append([*row, f"{result['milliseconds']:.1f}"])
    headers = ["", "sees, px", "AP", "AP50", "parameters", "MFLOPs", "ms per image"]
    align = ["left", *["right"] * 6]
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=align)


def run(name: str, *arguments: str) -> None:
    """Run a command of the project. It prints its own progress and errors."""
    print(f"\n$ {shlex.join([name, *arguments])}", flush=True)
    command = os.path.join(os.path.dirname(sys.executable), name)
    status = subprocess.run([sys.executable, "-W", "ignore", command, *arguments]).returncode
    if status:
        sys.exit(status)


def main(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    shutil.rmtree(args.output, ignore_errors=True)
    example = EXAMPLES[args.example]
    config, pictures = f"configs/quickstart/{example.config}.yaml", f"{args.output}/pictures"
    folders = {method: f"{args.output}/seed_0/{method}" for method in example.methods}
    plain, *_, warm = folders.values()
    search = f"{args.output}/seed_0/search-nats"

    run("nats-look", config, "--output", pictures)
    study = ["--config-file", config, "--search-config", config.replace(".yaml", "_search.yaml")]
    study += ["--methods", *example.methods, "--seeds", "1"]
    study += ["--jobs", str(min(2, os.cpu_count() or 1))]
    run("nats-study", *study, "--output", args.output)
    plot = ["--images", "2", "--threshold", str(example.threshold)]
    plot += ["--plain", config, f"{plain}/model_final.pth"]
    plot += ["--searched", f"{warm}/retrain.yaml", f"{warm}/model_final.pth"]
    run("nats-plot", search, "--output", pictures, *plot)
    run("nats-report", args.output, "--title", example.title)

    with open(f"{args.output}/results.json") as file:
        results = json.load(file)
    fields = {method: sees(folder) for method, folder in folders.items()}
    print(f"\n{table(example, results, fields)}\n\nAll but AP is the backbone's.")
    print(f"\n{example.sentence(results)}\n\n{time.perf_counter() - start:.0f} s in total")
    print(f"wrote {search}/architecture.yaml, {search}/retrain.yaml")
    print(f"a page to look at, and to send to others: {args.output}/report.html")


if __name__ == "__main__":
    parser = tool_parser(__doc__, EPILOG)
    parser.add_argument(
        "example", nargs="?", choices=EXAMPLES, default="registers", help="(%(default)s)"
    )
    parser.add_argument(
        "--output", default="output/demo", help="output folder, emptied first (%(default)s)"
    )
    main(parser.parse_args())
