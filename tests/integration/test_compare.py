"""At its end a search says what to compare it with; what it says is run."""

import logging
import re

import pytest
from calls import call
from runs import make_trainer

from detectron2_nats import Architecture
from detectron2_nats.config import load_config
from detectron2_nats.search.compare import (
    comparison_commands,
    equal_iterations,
    most_frequent,
)


def test_as_many_images_by_hand():
    words = ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "100", "SEARCH.ALPHA_IMS_PER_BATCH"]
    retrain = load_config("", ["SOLVER.IMS_PER_BATCH", "8", "SOLVER.MAX_ITER", "200"])
    # 100 weight steps of 4 images, and 60 α steps of as many, or of 2
    assert equal_iterations(load_config("", [*words, "0"]), retrain, 60) == 200 + 80
    search = load_config("", [*words, "2"])
    assert equal_iterations(search, retrain, 60) == 200 + 65
    assert equal_iterations(search, retrain, 60, trained=True) == 65


def test_the_lines():
    opts = ["SOLVER.IMS_PER_BATCH", "8", "SOLVER.MAX_ITER", "60"]
    search = load_config("", ["OUTPUT_DIR", "output/my search", *opts])
    opts = ["SOLVER.IMS_PER_BATCH", "8", "SOLVER.MAX_ITER", "200", "SOLVER.STEPS", "(160,)"]
    found = Architecture({"res3.0.conv2": [(8, 1, 1), (16, 1, 3)], "res3.1.conv2": [(8, 1, 1)]})
    assert most_frequent(found) == (1, 3)
    plain = Architecture({"res3.0.conv2": [[3, 1, 1]]})
    assert most_frequent(plain) == (1, 1)
    assert most_frequent(Architecture({"res3.0.conv2": [[3, 1, 1], [1, 2, 2]]})) == (2, 2)
    found = Architecture({"res3.0.conv2": [(8, 1, 1), (24, 1, 3)], "res3.1.conv2": [(8, 1, 1)]})
    lines = comparison_commands(search, load_config("", opts), found, 40).split("\n")
    config = "--config-file 'output/my search/config.yaml'"
    longer = "SOLVER.MAX_ITER 300 SOLVER.STEPS '(240,)'"
    assert "as many images as search and retraining together, 300 iterations" in lines[0]
    assert lines[1:5] == [
        f"  nats-draw {config} --random --output 'output/my search/random'",
        f"  python train_net.py --config-file 'output/my search/random/retrain.yaml' {longer}",
        f"  nats-draw {config} --uniform 1x3 --output 'output/my search/uniform'",
        f"  python train_net.py --config-file 'output/my search/uniform/retrain.yaml' {longer}",
    ]
    assert len(lines) == 5
    cosine = load_config("", [*opts, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"])
    assert "SOLVER.STEPS" not in comparison_commands(search, cosine, found, 40)


@pytest.fixture
def searched(tiny_config, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "detectron2_nats.search.trainer"):
        trainer = make_trainer(tiny_config, tmp_path / "search")
        trainer.train()
    (tmp_path / "search/config.yaml").write_text(trainer.cfg.dump())
    return caplog.text


def test_a_search_ends_with_commands_that_run(searched, tmp_path):
    iterations = int(re.search(r"SOLVER.MAX_ITER (\d+)", searched)[1])
    assert iterations == 6 + 6 + 4  # of the retraining, weight steps and α steps
    commands = re.findall(r"^  (nats-draw .*)$", searched, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert call(command).count("wrote ") == 2
    cfg = load_config(str(tmp_path / "search/random/retrain.yaml"))
    assert cfg.OUTPUT_DIR == str(tmp_path / "search/random/retrain")
