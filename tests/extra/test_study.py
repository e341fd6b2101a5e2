"""A study from its start to its tables, through a kill; and what it refuses."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from runs import TINY, finish, run, script, wait_until

from detectron2_nats.config import load_config


@pytest.fixture
def study(tmp_path):
    """The words of a study in tmp_path, without its methods: nine images in three folds."""
    (tmp_path / "search.yaml").write_text(f"VERSION: 2\n{TINY}")
    (tmp_path / "plain.yaml").write_text(
        "_BASE_: search.yaml\nMODEL: {BACKBONE: {NAME: build_resnet_fpn_backbone}}\n"
    )
    annotations = {"images": [], "annotations": []}
    for i in range(1, 10):
        Image.new("RGB", (64, 64), (9 * i, 20, 200)).save(tmp_path / f"{i}.png")
        annotations["images"].append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
        box = {"bbox": [i, 2, 30, 40], "area": 1200, "iscrowd": 0}
        annotations["annotations"].append({"id": i, "image_id": i, "category_id": 1, **box})
    annotations["categories"] = [{"id": i, "name": name} for i, name in enumerate("abcde", 1)]
    (tmp_path / "all.json").write_text(json.dumps(annotations))
    return [
        *("--config-file", f"{tmp_path}/plain.yaml", "--search-config", f"{tmp_path}/search.yaml"),
        *("--folds", "3", "--annotations", f"{tmp_path}/all.json", "--images", str(tmp_path)),
        *("--output", f"{tmp_path}/study", "--seeds", "1", "SOLVER.MAX_ITER", "4"),
    ]


def children_of(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_study_goes_on_after_a_kill(study, tmp_path):
    words = ["study/run.py", "--methods", "plain", "nats-warm-1.5x", *study]
    process = script(*words)
    output = tmp_path / "study"
    console = output / "seed_0/search-nats/console.txt"
    wait_until(lambda: console.exists() and "Starting training" in console.read_text(), process)
    (search,) = children_of(process)
    os.kill(search, signal.SIGSTOP)  # else it might have come to its end
    process.kill()
    process.wait()
    os.kill(search, signal.SIGCONT)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{search}").exists():  # it was told to stop
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "stopped on request" in console.read_text()

    printed = finish(script(*words))
    assert "1 of 3 runs are done" in printed and "[3/3]" in printed
    assert (output / "study.md").read_text() in printed
    results = json.loads((output / "results.json").read_text())
    plain, warm = results["methods"].values()
    for name in ("AP", "AP50", "AP75", "cpu_seconds", "architectures"):
        assert len(plain[name]) == len(warm[name]) == 1
    assert plain["flops"] == warm["flops"] > 0 and plain["parameters"] == warm["parameters"]
    assert plain["time_ratio"] == 1 and plain["architectures"] == [None]
    assert warm["architectures"] == results["searches"]["nats"]["architectures"]  # in voted order

    folder = output / "seed_0/nats-warm-1.5x"
    cfg = load_config(str(folder / "config.yaml"))
    assert (cfg.SOLVER.MAX_ITER, cfg.MODEL.WEIGHTS) == (6, str(folder / "frozen.pth"))
    assert cfg.DATASETS.TRAIN == ("study_0_rest",) and cfg.DATASETS.TEST == ("study_0_test",)
    searched = load_config(str(output / "seed_0/search-nats/config.yaml"))
    assert searched.DATASETS.TRAIN == ("study_0_train",) and searched.DATASETS.TEST == ()
    commands = [s for s in (folder / "console.txt").read_text().splitlines() if s[:2] == "$ "]
    assert [command.split()[1] for command in commands] == ["nats-export", "nats-train"]

    # what decides the results must be the same for all runs in a folder
    changed = run(*words, "MODEL.WEIGHTS", "other.pkl", status=2)
    assert "detector.yaml is of another study: " in changed and "'WEIGHTS: other.pkl'" in changed
    images = json.loads((tmp_path / "all.json").read_text())
    images["images"].pop()
    images["annotations"].pop()
    (tmp_path / "all.json").write_text(json.dumps(images))
    assert "all.json is of another study" in run(*words, status=2)


def test_a_search_in_one_run_and_a_run_that_fails(study, tmp_path):
    """Both without folds; the path-level run has one choice for each conv."""
    (tmp_path / "mine.yaml").write_text(
        "format: detectron2-nats/1\nlayers: {res3.0.conv2: [[16, 3, 3]]}\n"
    )
    del study[study.index("--folds") : study.index("--output")]
    words = ["study/run.py", "--methods", "path-one-run", *study]
    words += ["DATASETS.TEST", "('nats_embedded_val',)", "MODEL.NATS.SAMPLE", "True"]
    assert "path-one-run: set SEARCH.FREEZE_AT" in run(*words, status=2)
    words += ["SEARCH.FREEZE_AT", "0.5"]
    warm = [*words[:2], "nats-warm", *words[3:]]
    assert "nats-warm retrains what a search finds: set SEARCH.FREEZE_AT 1.0" in run(
        *warm, status=2
    )
    printed = run(*words)
    assert "| path-one-run |" in printed
    (method,) = json.loads((tmp_path / "study/results.json").read_text())["methods"].values()
    ((*_, (_, segments)),) = method["architectures"]
    assert len(segments) == 1 and method["AP"][0] >= 0
    failed = run(*words[:1], "--architecture", f"mine={tmp_path}/mine.yaml", *words[1:], status=2)
    assert "seed_0/mine/console.txt: error: " in failed and "res3.1.conv2" in failed
