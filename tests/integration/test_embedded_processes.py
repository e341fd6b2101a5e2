"""The embedded data set and its weights, made by processes of their own."""

import subprocess
import sys

import torch
from runs import REPOSITORY

from detectron2_nats.toy import sets

COUNTS = {"train": 12, "calibration": 8, "val": 6}


def test_processes_that_start_together_make_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    code = (
        "from detectron2_nats.toy import sets\n"
        "from dataclasses import replace\n"
        "whole = sets.SETS['nats_embedded']\n"
        f"sets.SETS['nats_embedded'] = replace(whole, splits={COUNTS})\n"
        "import logging; logging.basicConfig(level='INFO')\n"
        "print(sets.ensure_embedded_dataset())"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum(err.count("Making the embedded data set") for _, err in outputs) == 1
    assert len(list((tmp_path / "nats_embedded/train").iterdir())) == COUNTS["train"]


def test_pretraining_writes_a_loadable_file(tmp_path):
    path = tmp_path / "weights.pth"
    command = [sys.executable, "-W", "ignore", str(REPOSITORY / "tools/pretrain_embedded.py")]
    command += ["--steps", "1", "--output", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    shipped = torch.load(sets.WEIGHTS)["model"]
    fresh = torch.load(path)["model"]
    assert {k: v.shape for k, v in fresh.items()} == {k: v.shape for k, v in shipped.items()}
