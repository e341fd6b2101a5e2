"""nats-study: a study goes on after a kill, and shares out the GPUs that it was given."""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import TINY, finish, script, wait_until

from detectron2.modeling import build_model
from detectron2_nats.bench.study.collect import _spent
from detectron2_nats.bench.study.methods import Method, method_argument
from detectron2_nats.bench.study.metrics import last_metric
from detectron2_nats.bench.study.runs import Task, environment_of
from detectron2_nats.bench.study.trials import best
from detectron2_nats.commands import study as study_command
from detectron2_nats.config import load_config
from detectron2_nats.errors import NATSError
from detectron2_nats.method.architecture import Architecture


def children_of(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "given, shares",
    [
        ("4,5,7", ["4,5", "7,4"]),
        ("GPU-8932f937,GPU-72ab3c01", ["GPU-8932f937,GPU-72ab3c01"] * 2),
        (None, ["0,1", "2,0"]),
    ],
)
def test_shares_out_the_gpus_that_it_was_given(monkeypatch, given, shares):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    count = len(given.split(",")) if given else 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    environments = [environment_of(slot, jobs=2, gpus=2) for slot in (0, 1)]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == shares


@pytest.mark.parametrize(
    "method, kind, known",
    [
        ("plain-1.5x", "plain", True),
        ("random-2x", "random", True),
        ("plain-long", "plain", True),
        ("plain-0x", "plain", False),
        ("plain-x", "plain-x", False),
        ("plain-long-2x", "plain", False),
        ("nats-voted-2x", "nats-voted", True),
        ("nats-warm@0.1", "nats-warm", True),
        ("nats-warm@2-1.5x", "nats-warm", True),
        ("path-warm@2", "path-warm", False),
        ("nats-warm@.25-1.5x", "nats-warm", True),
        ("path-warm-1.5x", "path-warm", True),
        ("path-warm@0.1", "path-warm", False),
        ("5x5-1.5x", "5x5", True),
        ("cycle", "cycle", True),
        ("sawtooth-2x", "sawtooth", True),
        ("random-best-of-4", "random-best-of-4", True),
        ("random-best-of-12-1.5x", "random-best-of-12", True),
        ("random-best-of-1", "random-best-of-1", False),
        ("random-best-of-4@0.1", "random-best-of-4", False),
        ("cycle-warm", "cycle-warm", False),
        ("1x3-warm", "1x3-warm", True),
        ("5x5@0.1", "5x5", False),
        ("0x3", "0x3", False),
        ("nats-warm@1", "nats-warm", True),
        ("plain@0.1", "plain", False),
        ("SOLVER.MAX_ITER", "SOLVER.MAX_ITER", False),
    ],
)
def test_methods(method, kind, known):
    assert Method.of(method).kind == kind
    if known:
        assert method_argument(method) == method
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="KEY VALUE pairs come after"):
            method_argument(method)


def test_study_goes_on_after_a_kill(tmp_path, monkeypatch):
    (tmp_path / "search.yaml").write_text(f"VERSION: 2\n{TINY}")
    (tmp_path / "plain.yaml").write_text(
        "_BASE_: search.yaml\nMODEL: {BACKBONE: {NAME: build_resnet_fpn_backbone}}\n"
    )
    output = tmp_path / "study"
    arguments = [
        "--methods",
        "plain",
        "nats-voted",
        "--seeds",
        "1",
        "--output",
        str(output),
    ]
    arguments += ["--config-file", str(tmp_path / "plain.yaml")]
    arguments += ["--search-config", str(tmp_path / "search.yaml")]
    arguments += ["SOLVER.MAX_ITER", "4", "DATASETS.TEST", "('nats_embedded_val',)"]
    arguments += ["MODEL.RESNETS.STEM_OUT_CHANNELS", "12"]
    process = script("nats-study", *arguments)
    console = output / "seed_0" / "search-nats" / "console.txt"
    wait_until(lambda: console.exists() and "Starting training" in console.read_text(), process)
    (run_of_it,) = children_of(process)
    os.kill(run_of_it, signal.SIGSTOP)  # else it might have come to its end
    process.kill()
    process.wait()
    os.kill(run_of_it, signal.SIGCONT)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{run_of_it}").exists():  # it was told to stop
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "stopped on request" in console.read_text()
    printed = finish(script("nats-study", *arguments))
    assert "0 of 3 runs are done" in printed and "[3/3]" in printed
    table = (output / "study.md").read_text()
    (search,) = [line for line in table.splitlines() if line.startswith("| nats  ")]
    assert "≥" in search and table.count("≥") == 1  # nobody saw how much the killed one took
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    # in both tables, and in that of the classes where something was detected
    assert rows.count("nats-voted") in (2, 3) and "1 seeds" in table
    assert (output / "study.png").stat().st_size > 1000
    measured = json.loads((output / "results.json").read_text())["methods"]
    assert measured["plain"]["flops"] == measured["nats-voted"]["flops"] > 0

    found = Architecture.from_config(measured["nats-voted"]["architectures"][0])
    found.save(str(tmp_path / "found.yaml"))
    arguments[arguments.index("--methods") : arguments.index("--seeds")] = [
        *("--methods", "plain", "--architecture", f"found-1.5x={tmp_path / 'found.yaml'}")
    ]
    assert "1 of 2 runs are done" in finish(script("nats-study", *arguments))
    cfg = load_config(str(output / "seed_0/found-1.5x/retrain.yaml"))  # complete by itself
    assert cfg.MODEL.RESNETS.STEM_OUT_CHANNELS == 12
    cfg = load_config(str(output / "seed_0/found-1.5x/config.yaml"))
    assert Architecture.from_config(cfg.MODEL.NATS.ARCHITECTURE).layers == found.layers
    assert cfg.SOLVER.MAX_ITER == 6
    turned = {name: segments[::-1] for name, segments in found.layers.items()}
    Architecture(turned).save(str(tmp_path / "found.yaml"))
    changed = finish(script("nats-study", *arguments), status=2)
    assert "found.yaml is another architecture than that in" in changed

    # one dilation everywhere, with the search's weights: what its run would be started with
    arguments[arguments.index("--methods") + 1] = "3x3-warm"
    arguments[arguments.index("--architecture") : arguments.index("--seeds")] = []
    monkeypatch.setattr(sys, "argv", ["nats-study", *arguments])
    started = study_command.study_of(study_command.parse_args()).task("3x3-warm", 0).prepare()
    cfg = load_config(
        started[started.index("--config-file") + 1], started[started.index("--num-gpus") + 2 :]
    )
    dilations = {(h, w) for _, segments in cfg.MODEL.NATS.ARCHITECTURE for _, h, w in segments}
    assert dilations == {(3, 3)} and cfg.SOLVER.MAX_ITER == 4
    assert cfg.MODEL.WEIGHTS == str(output / "seed_0/3x3-warm/frozen.pth")
    build_model(cfg).load_state_dict(torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"])


@pytest.fixture
def prepared(tmp_path):
    """A function: options → their study in tmp_path, of which nothing is run."""
    (tmp_path / "search.yaml").write_text(f"VERSION: 2\n{TINY}")
    (tmp_path / "plain.yaml").write_text(
        "_BASE_: search.yaml\nMODEL: {BACKBONE: {NAME: build_resnet_fpn_backbone}}\n"
    )

    def study(*opts, test="('nats_embedded_val',)"):
        arguments = ["--config-file", "plain.yaml", "--search-config", "search.yaml", *opts]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", ["nats-study", *arguments, "DATASETS.TEST", test])
            return study_command.study_of(study_command.parse_args())

    return study


def test_what_would_fail_after_the_search_fails_now(prepared, tmp_path):
    study = prepared
    one = ("--methods", "plain", "--seeds", "1")
    with pytest.raises(NATSError, match="expected one data set, or --folds"):
        study(*one, test="()")
    with pytest.raises(NATSError, match=r"2x2-warm: res3.0.conv2: .*16, 2, 2"):  # not in set A
        study("--methods", "2x2-warm", "--seeds", "1")
    study("--methods", "2x2", "3x3-warm", "--seeds", "1")
    Architecture({"res3.0.conv2": [(16, 3, 3)]}).save(str(tmp_path / "part.yaml"))
    with pytest.raises(NATSError, match="mine: .*res3.1.conv2"):
        study(*one, "--architecture", "mine=part.yaml")


def test_another_study_in_the_same_folder_is_refused(prepared, tmp_path):
    """What decides the AP must be equal for all of its runs."""
    study = prepared
    one = ("--methods", "plain", "--seeds", "1")
    study(*one)
    study(*one, "MODEL.DEVICE", "cpu", "RUN.LOG_PERIOD", "7")
    for change in (["MODEL.WEIGHTS", "other.pkl"], ["TEST.DETECTIONS_PER_IMAGE", "7"]):
        with pytest.raises(NATSError, match=f"is of another study: config: {change[0]}"):
            study(*one, *change)
    with pytest.raises(NATSError, match="is of another study: config: DATASETS.TEST"):
        study(*one, test="('nats_embedded_calibration',)")


def test_other_annotations_of_the_same_name_are_refused(prepared, tmp_path):
    """Other folds would test images that earlier runs were trained on."""
    study = prepared
    sizes = {"width": 64, "height": 64}
    boxes = {"images": [{"id": i, "file_name": f"{i}.png", **sizes} for i in range(9)]}
    boxes["annotations"] = [
        {
            "id": i + 1,
            "image_id": i,
            "category_id": 1,
            "bbox": [1, 2, 30, 40],
            "area": 1200,
            "iscrowd": 0,
        }
        for i in range(9)
    ]
    boxes["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate("abcde")]
    (tmp_path / "all.json").write_text(json.dumps(boxes))
    folds = ("--seeds", "1", "--folds", "3", "--annotations", "all.json", "--images", "here")
    study("--methods", "plain", *folds)
    fold = (tmp_path / "output/study/data/fold_0/test.json").read_text()
    study("--methods", "plain", *folds)
    boxes["images"].append({"id": 9, "file_name": "9.png", **sizes})
    (tmp_path / "all.json").write_text(json.dumps(boxes))
    with pytest.raises(NATSError, match="another study: content of the annotations"):
        study("--methods", "plain", *folds)
    assert (tmp_path / "output/study/data/fold_0/test.json").read_text() == fold


def test_a_line_that_a_kill_has_cut_off(tmp_path):
    (tmp_path / "metrics.json").write_text('{"bbox/AP": 3.5}\n{"bbox/AP": 4')
    assert last_metric(str(tmp_path), "bbox/AP") == 3.5
    with pytest.raises(NATSError, match="metrics.json contains no bbox/AP75"):
        last_metric(str(tmp_path), "bbox/AP75")


def ended(task, precision, cpu_seconds):
    """As if a run had been done."""
    folder = Path(task.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({"bbox/AP": precision}) + "\n")
    cost = {"seconds": 1, "cpu_seconds": cpu_seconds, "done": True, "lost": 0}
    (folder / "cost.json").write_text(json.dumps(cost))


def test_the_best_of_several_draws(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    methods = ["random", "random-best-of-3", "random-best-of-3-2x"]
    study = prepared("--methods", *methods, "--seeds", "1", "SOLVER.WARMUP_ITERS", "3")
    trials = [task for task in study.tasks if task.role == "trial"]
    assert len(trials) == 3 and len(study.tasks) == 6
    once, twice = (study.task(name, 0) for name in methods[1:])
    assert once.after == twice.after == trials
    command = trials[1].prepare()
    options = {key: command[command.index(key) + 1] for key in command if key.isupper()}
    last = dict(zip(command[-12::2], command[-11::2]))
    # a third of the search's 6 iterations, on its splits
    assert last["SOLVER.MAX_ITER"] == "2" and last["SOLVER.WARMUP_ITERS"] == "1"
    assert last["DATASETS.TRAIN"] == "('nats_embedded_train',)"
    assert last["DATASETS.TEST"] == "('nats_embedded_calibration',)"
    assert options["OUTPUT_DIR"] == trials[1].folder
    for task, precision in zip(trials, (10.0, 30.0, float("nan"))):
        ended(task, precision, 5)
    written = load_config(command[command.index("--config-file") + 1]).MODEL.NATS.ARCHITECTURE
    random, chosen = (study.architecture(Method.of(name), 0) for name in methods[:2])
    assert chosen == Architecture.from_config(written) != random
    ended(trials[0], 30.0, 5)  # of equal ones the first, which is that of random
    assert study.architecture(Method.of(methods[1]), 0) == random
    ended(once, 50.0, 7)
    assert _spent([once]) == {"cpu_seconds": [22], "lost_starts": [0]}
    with pytest.raises(NATSError, match="only 6 iterations"):
        prepared("--methods", "random-best-of-7", "--seeds", "1", "--output", "other")


def test_the_best_of_several_draws_is_trained(tmp_path):
    """For real: the draws, the retraining of the best one, and what they took together."""
    (tmp_path / "search.yaml").write_text(f"VERSION: 2\n{TINY}")
    (tmp_path / "plain.yaml").write_text(
        "_BASE_: search.yaml\nMODEL: {BACKBONE: {NAME: build_resnet_fpn_backbone}}\n"
    )
    arguments = ["--methods", "random-best-of-2", "--seeds", "1", "--output", str(tmp_path / "s")]
    arguments += ["--config-file", str(tmp_path / "plain.yaml")]
    arguments += ["--search-config", str(tmp_path / "search.yaml")]
    arguments += ["SOLVER.MAX_ITER", "4", "DATASETS.TEST", "('nats_embedded_val',)"]
    assert "[3/3]" in finish(script("nats-study", *arguments))
    folder = tmp_path / "s/seed_0"
    draws = [f"random-best-of-2-draw-{draw}" for draw in (0, 1)]
    names = [*draws, "random-best-of-2"]
    configs = {name: load_config(str(folder / name / "config.yaml")) for name in names}
    assert [configs[name].SOLVER.MAX_ITER for name in names] == [2, 2, 4]
    assert configs[draws[0]].DATASETS.TEST == ("nats_embedded_calibration",)
    found = {name: configs[name].MODEL.NATS.ARCHITECTURE for name in names}
    assert found[draws[0]] != found[draws[1]]
    chosen = best([str(folder / name) for name in draws])
    assert found["random-best-of-2"] == found[draws[chosen]]
    # what the tables at equal time give: the draws' time is the method's
    measured = json.loads((tmp_path / "s/results.json").read_text())["methods"]
    took = [json.loads((folder / name / "cost.json").read_text())["cpu_seconds"] for name in names]
    assert min(took) > 0
    assert measured["random-best-of-2"]["cpu_seconds"] == [pytest.approx(sum(took))]
    minutes = f" {sum(took) / 60:.1f} "
    assert minutes in (tmp_path / "s/study.md").read_text()


def test_cycle_and_sawtooth(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = prepared("--methods", "cycle", "sawtooth", "--seeds", "1")
    cycle, sawtooth = (study.architecture(method, 0) for method in study.methods)
    assert cycle.layers["res3.0.conv2"][:2] == ((1, 1, 1), (1, 2, 2))
    assert [s[0][1] for s in sawtooth.layers.values()][:4] == [1, 2, 3, 1]


def test_which_search_a_method_needs():
    for method in ("plain-long", "random-2x", "5x5-1.5x", "mine", "mine-1.5x"):
        assert Method.of(method).search == ""
    for method in ("nats-paper", "nats-warm@0.1-2x", "transposed", "5x5-warm-2x", "mine-warm"):
        assert Method.of(method).search == "nats"
    assert Method.of("path-warm").search == Method.of("path").search == "path"


def test_all_starts_of_a_run_count(tmp_path):
    ended(task := Task("retraining", str(tmp_path), lambda: ["-c", "pass"]), 0.0, 50)
    task.start({})
    while task.poll() is None:
        time.sleep(0.01)
    cost = task.cost()
    assert cost["cpu_seconds"] > 50 and cost["seconds"] > 1 and cost["lost"] == 0


def test_a_run_that_had_ended_when_it_was_told_to_stop(tmp_path):
    """Sending a signal takes its exit status first; that must not hide what went wrong."""
    task = Task("retraining", str(tmp_path), lambda: ["-c", "raise SystemExit(3)"])
    task.start({})
    os.waitid(os.P_PID, task.process.pid, os.WEXITED | os.WNOWAIT)
    task.process.send_signal(signal.SIGTERM)
    assert task.poll() == 3
