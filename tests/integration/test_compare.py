"""At its end a search says what to compare it with; what it says is run."""

import argparse
import logging
import re
import shlex

import pytest
import torch
from ranks import on_two_ranks
from runs import assert_same_run, make_trainer

from detectron2_nats import Architecture, NATSError
from detectron2_nats.commands import draw, score
from detectron2_nats.commands import search as search_command
from detectron2_nats.config import load_config
from detectron2_nats.engine.loader import dataset_dicts
from detectron2_nats.search.compare import (
    StepTimes,
    comparison_commands,
    equal_time_iterations,
    most_frequent,
)
from detectron2_nats.search.score import candidates, one_shot_score, scoring_batches, some_of


def test_equal_time_by_hand():
    times = StepTimes()
    assert times.in_weight_steps(100, 60) is None
    times.add(9.0)  # the first step is slow
    times.add(2.0)
    times.add(2.0, 1.0)
    times.add(2.0, 1.0)
    # 100 weight steps, and 60 α steps of half their time
    assert times.in_weight_steps(100, 60) == 130
    search = load_config("", ["SOLVER.IMS_PER_BATCH", "4"])
    retrain = load_config("", ["SOLVER.IMS_PER_BATCH", "8", "SOLVER.MAX_ITER", "200"])
    assert equal_time_iterations(search, retrain, 130) == 200 + 65


def test_the_lines():
    search = load_config("", ["OUTPUT_DIR", "output/my search", "SOLVER.IMS_PER_BATCH", "8"])
    opts = ["SOLVER.IMS_PER_BATCH", "8", "SOLVER.MAX_ITER", "200", "SOLVER.STEPS", "(160,)"]
    found = Architecture({"res3.0.conv2": [(8, 1, 1), (16, 1, 3)], "res3.1.conv2": [(8, 1, 1)]})
    assert most_frequent(found) == (1, 3)
    plain = Architecture({"res3.0.conv2": [[3, 1, 1]]})
    assert most_frequent(plain) == (1, 1)
    assert most_frequent(Architecture({"res3.0.conv2": [[3, 1, 1], [1, 2, 2]]})) == (2, 2)
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
    assert len(lines) == 5
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


@pytest.fixture
def search(tiny_config, tmp_path, monkeypatch, caplog):
    """A function: runs what nats-search runs, and returns the trainer and what it said."""
    monkeypatch.setattr("detectron2_nats.SearchTrainer", search_command._ReportingTrainer)
    # pictures take longer than these searches
    monkeypatch.setattr(search_command._ReportingTrainer, "_draw", lambda trainer: None)

    def searched(name, *opts):
        caplog.clear()
        with caplog.at_level(logging.INFO, "detectron2_nats"):
            trainer = make_trainer(tiny_config, tmp_path / name, *opts)
            trainer.train()
        return trainer, [r for r in caplog.records if r.name == search_command.__name__]

    return searched


def test_a_search_ends_with_what_the_score_says(search, tmp_path):
    trainer, (said,) = search("search", "SEARCH.SCORE_IMAGES", "4")
    rows = dict(re.findall(r"^(\w+(?: \w+)?) +(\d+\.\d{4})$", said.getMessage(), re.MULTILINE))
    assert set(rows) == {"found", "plain", "all 3x3", *(f"random {i}" for i in range(6))}
    worse = sum(rows["plain"] > rows[f"random {i}"] for i in range(6))
    assert f"\nPlain has a higher loss than {worse} of 6 random" in said.getMessage()
    assert said.getMessage().endswith(f"\n  nats-score {tmp_path}/search")
    cfg = trainer.cfg
    records = some_of(dataset_dicts(cfg, cfg.DATASETS.CALIBRATION), 4)
    batches = scoring_batches(cfg, records)
    for name, architecture in candidates(cfg, trainer.model, 1).items():
        assert f"{one_shot_score(trainer.model, architecture, batches):.4f}" == rows[name]

    # it changes nothing; a finished search says it again
    states = torch.get_rng_state()
    _, (again,) = search("search", "SEARCH.SCORE_IMAGES", "4")
    assert again.getMessage().split(" s):")[1] == said.getMessage().split(" s):")[1]
    _, (short,) = search("other")
    assert short.getMessage().startswith("Whether a wider field pays at all")
    assert torch.equal(torch.get_rng_state(), states)
    assert_same_run(str(tmp_path / "search"), str(tmp_path / "other"))


def test_a_search_does_not_fail_by_its_score(search, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(search_command, "one_shot_score", fail)
    _, (warning, command) = search("search", "SEARCH.SCORE_IMAGES", "2")
    assert warning.levelname == "WARNING"
    assert warning.getMessage() == "no score of what was found: RuntimeError: out of memory"
    assert f"\n  nats-score {tmp_path}/search" in command.getMessage()
    assert (tmp_path / "search/retrain.yaml").is_file()


def said_by_a_rank(config, folder, *opts):
    """What one of two processes logs of its score."""
    import detectron2_nats

    detectron2_nats.SearchTrainer = search_command._ReportingTrainer
    search_command._ReportingTrainer._draw = lambda trainer: None
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger(search_command.__name__)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    make_trainer(config, folder, *opts).train()
    return said


def test_the_first_of_two_processes_scores(tiny_config, tmp_path):
    """Alone: a norm that waited there for the other one would never end."""
    opts = ["MODEL.RESNETS.NORM", "SyncBN", "SEARCH.SCORE_IMAGES", 2]
    first, second = on_two_ranks(said_by_a_rank, tiny_config, str(tmp_path), *opts)
    assert len(first) == 1 and "Plain has a higher loss than" in first[0] and not second


def test_a_run_that_freezes_is_scored_at_that_moment(search, tmp_path):
    """It changes nothing of the run, and afterwards the weights suit nothing else."""
    opts = ["MODEL.NATS.SAMPLE", True, "SEARCH.RETRAIN_WEIGHTS", "supernet"]
    opts += ["SEARCH.FREEZE_AT", 0.5]
    search("silent", *opts)
    trainer, said = search("said", *opts, "SEARCH.SCORE_IMAGES", 2)
    (line,) = [record.getMessage() for record in said if "Losses on 2" in record.getMessage()]
    assert "More images" not in line
    assert_same_run(tmp_path / "silent", tmp_path / "said")
    (tmp_path / "said/config.yaml").write_text(trainer.cfg.dump())
    with pytest.raises(NATSError, match="went on to train what it found"):
        score.main(argparse.Namespace(search=str(tmp_path / "said"), images=2))
