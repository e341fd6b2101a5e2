#!/usr/bin/env python
"""Search, freeze, retrain and compare on the embedded data set, by the scripts themselves."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time

import torch
from tabulate import tabulate

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import build_detection_test_loader
from detectron2.modeling import build_model
from detectron2_nats.analysis import backbone_cost, interleaved_seconds
from detectron2_nats.errors import NATSError
from detectron2_nats.export import load_config

EPILOG = """
example:
  $ python tools/demo.py --output output/demo
"""


def run(title: str, folder: str, *command: str) -> None:
    """Run a script; its log goes to FOLDER/console.txt, its progress to the terminal."""
    os.makedirs(folder)
    console = os.path.join(folder, "console.txt")
    start = time.perf_counter()
    print(f"\n{title}\n  $ python {' '.join(command)}", flush=True)
    with open(console, "w") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        for line in process.stdout:
            log.write(line)
            if "iter: " in line or "entropy" in line:
                print("  " + line.split("]: ", 1)[-1].strip()[:150], flush=True)
        if process.wait():
            raise NATSError(f"it failed with status {process.returncode}: see {console}")
    print(f"  {time.perf_counter() - start:.0f} s")


def last_result(folder: str) -> dict:
    """The last evaluation in a run's metrics.json."""
    with open(os.path.join(folder, "metrics.json")) as file:
        results = [json.loads(line) for line in file]
    return [result for result in results if "bbox/AP" in result][-1]


def compare(configs: dict) -> str:
    """A table of {name: (config file, output folder)}: accuracy, cost, time per image."""
    models, costs, images = {}, {}, None
    for name, (path, folder) in configs.items():
        cfg = load_config(path)
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
        model = build_model(cfg).eval()
        DetectionCheckpointer(model).load(os.path.join(folder, "model_final.pth"))
        models[name] = model
        costs[name] = backbone_cost(model.backbone, 128, 128)
        if images is None:
            images = list(build_detection_test_loader(cfg, cfg.DATASETS.TEST[0]))[:20]

    def detect(model):
        with torch.no_grad():
            for batch in images:
                model(batch)

    seconds = interleaved_seconds([lambda m=m: detect(m) for m in models.values()], rounds=5)
    rows = []
    for (name, (_, folder)), values in zip(configs.items(), seconds):
        result, cost = last_result(folder), costs[name]
        rows.append(
            (
                name,
                f"{result['bbox/AP']:.1f}",
                f"{result['bbox/AP50']:.1f}",
                f"{sum(p.numel() for p in models[name].parameters()):,}",
                f"{cost.flops / 1e6:,.1f}",
                f"{statistics.median(values) / len(images) * 1e3:.1f}",
            )
        )
    headers = ("", "AP", "AP50", "parameters", "backbone MFLOPs", "ms per image")
    return tabulate(rows, headers, disable_numparse=True, stralign="right")


def main(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    shutil.rmtree(args.output, ignore_errors=True)
    search, plain, searched = (
        os.path.join(args.output, name) for name in ("search", "plain", "searched")
    )
    base = "configs/quickstart/base.yaml"
    run(
        "1/3 Search: weights on one split, dilations on another",
        search,
        *("search_net.py", "--config-file", "configs/quickstart/search.yaml"),
        *("OUTPUT_DIR", search),
    )
    retrain = os.path.join(search, "retrain.yaml")
    run(
        "2/3 Retrain the searched detector from the classifier's weights",
        searched,
        *("train_net.py", "--config-file", retrain, "OUTPUT_DIR", searched),
    )
    run(
        "3/3 Train the plain detector beside it",
        plain,
        *("train_net.py", "--config-file", base, "OUTPUT_DIR", plain),
    )
    print("\n" + compare({"plain": (base, plain), "searched": (retrain, searched)}))
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    for path in (
        os.path.join(search, "architecture.yaml"),
        retrain,
        os.path.join(plain, "model_final.pth"),
        os.path.join(searched, "model_final.pth"),
    ):
        print(f"wrote {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", default="output/demo", help="folder, emptied first (%(default)s)"
    )
    try:
        main(parser.parse_args())
    except NATSError as error:
        sys.exit(f"error: {error}")
