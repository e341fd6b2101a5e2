"""At its end a search says what to compare it with; what it says is run."""

import logging
import re
import shlex

import pytest
from runs import make_trainer

from detectron2_nats import Architecture
from detectron2_nats.commands import draw
from detectron2_nats.config import load_config
from detectron2_nats.search.compare import (
    StepTimes,
    comparison_commands,
    equal_time_iterations,
    most_frequent,
)


def test_equal_time_by_hand():
    times = StepTimes()
    assert times.in_weight_steps(100, 40) is None
    times.add(9.0)  # the first step is slow
    times.add(2.0)
    times.add(2.0, 1.0)
    times.add(2.0, 1.0)
    # 100 weight steps, and 60 α steps of half their time
    assert times.in_weight_steps(100, 40) == 130
    search = load_config("", ["SOLVER.IMS_PER_BATCH", "4"])
    retrain = load_config("", ["SOLVER.IMS_PER_BATCH", "8", "SOLVER.MAX_ITER", "200"])
    assert equal_time_iterations(search, retrain, 130) == 200 + 65


def test_the_lines():
    search = load_config("", ["OUTPUT_DIR", "output/my search", "SOLVER.IMS_PER_BATCH", "8"])
    opts = ["SOLVER.IMS_PER_BATCH", "8", "SOLVER.MAX_ITER", "200", "SOLVER.STEPS", "(160,)"]
    found = Architecture({"res3.0.conv2": [(8, 1, 1), (16, 1, 3)], "res3.1.conv2": [(8, 1, 1)]})
    assert most_frequent(found) in ((1, 1), (1, 3))
    found = Architecture({"res3.0.conv2": [(8, 1, 1), (24, 1, 3)], "res3.1.conv2": [(8, 1, 1)]})
    lines = comparison_commands(search, load_config("", opts), found, 100.0).split("\n")
    config = "--config-file 'output/my search/config.yaml'"
    longer = "SOLVER.MAX_ITER 300 SOLVER.STEPS '(240,)'"
    assert "300 iterations (a lower bound" in lines[0]
    assert lines[1:5] == [
        f"  nats-draw {config} --random --output 'output/my search/random'",
        f"  python train_net.py --config-file 'output/my search/random/retrain.yaml' {longer}",
        f"  nats-draw {config} --uniform 1x3 --output 'output/my search/uniform'",
        f"  python train_net.py --config-file 'output/my search/uniform/retrain.yaml' {longer}",
    ]
    assert lines[-1] == "  nats-score 'output/my search'"
    lines = comparison_commands(search, load_config("", opts), found, None).split("\n")
    assert "not measured" in lines[0] and lines[2].endswith("random/retrain.yaml'")
    cosine = load_config("", [*opts, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"])
    assert "SOLVER.STEPS" not in comparison_commands(search, cosine, found, 100.0)


@pytest.fixture
def searched(tiny_config, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "detectron2_nats.search.trainer"):
        trainer = make_trainer(tiny_config, tmp_path / "search")
        trainer.train()
    (tmp_path / "search/config.yaml").write_text(trainer.cfg.dump())
    return caplog.text


def test_a_search_ends_with_commands_that_run(searched, tmp_path, monkeypatch, capsys):
    iterations = int(re.search(r"SOLVER.MAX_ITER (\d+)", searched)[1])
    assert iterations >= 6 + 6  # what retraining takes, and the weight steps of the search
    commands = re.findall(r"^  (nats-draw .*)$", searched, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        monkeypatch.setattr("sys.argv", shlex.split(command))
        draw.run()
        assert capsys.readouterr().out.count("wrote ") == 2
    cfg = load_config(str(tmp_path / "search/random/retrain.yaml"))
    assert cfg.OUTPUT_DIR == str(tmp_path / "search/random/retrain")
