"""The embedded data set and its weights, made by processes of their own."""

import multiprocessing
import runpy
import sys
from dataclasses import replace

import torch
from runs import REPOSITORY

from detectron2_nats.toy import sets

COUNTS = {"train": 12, "calibration": 8, "val": 6}


def test_processes_that_start_together_have_one_set(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    small = replace(sets.SETS["nats_embedded"], splits=COUNTS)
    monkeypatch.setitem(sets.SETS, "nats_embedded", small)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=sets.ensure_embedded_dataset) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["nats_embedded"]
    assert len(list((tmp_path / "nats_embedded/train").iterdir())) == COUNTS["train"]


def test_pretraining_writes_a_loadable_file(tmp_path, monkeypatch):
    path, tool = tmp_path / "weights.pth", str(REPOSITORY / "tools/pretrain_embedded.py")
    monkeypatch.setattr(sys, "argv", [tool, "--steps", "1", "--output", str(path)])
    runpy.run_path(tool, run_name="__main__")
    shipped = torch.load(sets.WEIGHTS)["model"]
    fresh = torch.load(path)["model"]
    assert {k: v.shape for k, v in fresh.items()} == {k: v.shape for k, v in shipped.items()}
