"""The embedded data set and its weights, made by processes of their own."""

import logging
import multiprocessing
import runpy
import sys
from dataclasses import replace

import torch
from runs import REPOSITORY

from detectron2_nats.toy import sets

COUNTS = {"train": 12, "calibration": 8, "val": 6}


def make(log):
    logging.basicConfig(level="INFO", filename=log, force=True)
    sets.ensure_embedded_dataset()


def test_processes_that_start_together_make_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    small = replace(sets.SETS["nats_embedded"], splits=COUNTS)
    monkeypatch.setitem(sets.SETS, "nats_embedded", small)
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=make, args=(log,)) for log in logs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    lines = "".join(log.read_text() for log in logs)
    assert lines.count("Making the embedded data set") == 1
    assert len(list((tmp_path / "nats_embedded/train").iterdir())) == COUNTS["train"]


def test_pretraining_writes_a_loadable_file(tmp_path, monkeypatch):
    path, tool = tmp_path / "weights.pth", str(REPOSITORY / "tools/pretrain_embedded.py")
    monkeypatch.setattr(sys, "argv", [tool, "--steps", "1", "--output", str(path)])
    runpy.run_path(tool, run_name="__main__")
    shipped = torch.load(sets.WEIGHTS)["model"]
    fresh = torch.load(path)["model"]
    assert {k: v.shape for k, v in fresh.items()} == {k: v.shape for k, v in shipped.items()}
