"""The one-shot score against the decoded network that it stands for."""

import logging
import re

import numpy as np
import pytest
import torch
from ranks import on_two_ranks
from runs import TINY, assert_same_run, make_trainer

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from detectron2_nats import Architecture, NATSError
from detectron2_nats.engine.loader import dataset_dicts
from detectron2_nats.method.transform import frozen_state_dict
from detectron2_nats.search import hooks, score
from detectron2_nats.search.export import export_config, searched_detector
from detectron2_nats.search.folder import SearchFolder
from detectron2_nats.search.score import (
    candidates,
    field_verdict,
    one_shot_score,
    score_folder,
    scoring_batches,
    some_of,
)


@pytest.fixture(scope="module", params=[False, True], ids=["mixed", "sampled"])
def trainer(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("score")
    config = folder / "tiny.yaml"
    config.write_text(TINY)
    trainer = make_trainer(str(config), folder / "run", "MODEL.NATS.SAMPLE", request.param)
    torch.manual_seed(0)
    with torch.no_grad():  # as after a search: no two replicas are alike
        for conv in trainer.searched.values():
            if conv.replicas is not None:
                conv.replicas += 0.05 * torch.randn_like(conv.replicas)
            conv.alpha.copy_(torch.randn_like(conv.alpha))
    return trainer


@pytest.fixture(scope="module")
def batches(trainer):
    records = dataset_dicts(trainer.cfg, trainer.cfg.DATASETS.CALIBRATION)[:4]
    return scoring_batches(trainer.cfg, records)


def test_score_is_the_loss_of_the_decoded_network(trainer, batches):
    found = Architecture.decode(trainer.model, "voted")
    frozen = build_model(export_config(searched_detector(trainer.cfg), found))
    weights = frozen_state_dict(trainer.model, found)
    frozen.load_state_dict(weights)
    frozen.train()
    losses = []
    with torch.no_grad(), EventStorage(), torch.random.fork_rng([]):
        torch.manual_seed(0)
        losses = [float(sum(frozen(batch).values())) for batch in batches]
    value = one_shot_score(trainer.model, found, batches)
    assert value == pytest.approx(np.mean(losses), rel=1e-4)
    plain = Architecture({n: [(c.out_channels, 1, 1)] for n, c in trainer.searched.items()})
    assert abs(one_shot_score(trainer.model, plain, batches) - value) > 1e-3 * value


def test_scores_change_nothing_and_repeat(trainer, batches):
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    found = Architecture.decode(trainer.model, "voted")
    state = torch.get_rng_state()
    first = one_shot_score(trainer.model, found, batches)
    assert one_shot_score(trainer.model, found, batches) == first
    assert torch.equal(torch.get_rng_state(), state)
    after = trainer.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    "plain, worse, verdict",
    [
        (0.9, 4, "a wider field pays"),
        (0.35, 3, "this does not tell whether a wider field pays"),
        (0.25, 2, "a wider field does not pay"),
        (0.05, 0, "a wider field does not pay"),
    ],
)
def test_the_place_of_plain_among_random_ones_is_the_verdict(plain, worse, verdict):
    scores = {f"random {i}": score for i, score in enumerate((0.1, 0.4, 0.2, 0.3))}
    sentence = field_verdict({"found": 0.01, "plain": plain, "all 3x3": 0.02, **scores})
    assert sentence == f"Plain has a higher loss than {worse} of 4 random architectures: {verdict}."


def rows_of(text):
    """Name → loss, as printed."""
    return dict(re.findall(r"^(\w+(?: \w+)?) +(\d+\.\d{4})$", text, re.MULTILINE))


def assert_report(text, trainer, records):
    """It has the scores of all candidates on these images, and their verdict."""
    rows = rows_of(text)
    batches = scoring_batches(trainer.cfg, records)
    expected = {
        name: one_shot_score(trainer.model, architecture, batches)
        for name, architecture in candidates(trainer.cfg, trainer.model, 6).items()
    }
    common = set.intersection(*(set(conv.genotypes) for conv in trainer.searched.values()))
    names = {"plain" if d == (1, 1) else f"all {d[0]}x{d[1]}" for d in common}
    assert len(names) > 1
    assert set(expected) == {"found", *names, *(f"random {seed}" for seed in range(6))}
    assert rows == {name: f"{score:.4f}" for name, score in expected.items()}
    assert text.endswith(field_verdict(expected))


@pytest.fixture
def folder(trainer, tmp_path):
    """Its search's output folder, whose newest checkpoint is damaged."""
    (tmp_path / "config.yaml").write_text(trainer.cfg.dump())
    state_dict = trainer.model.state_dict()
    torch.save({"model": state_dict}, tmp_path / "model_0000003.pth")
    other = {k: -v if k.endswith(".alpha") else v for k, v in state_dict.items()}
    newest = tmp_path / "model_final.pth"
    torch.save({"model": other}, newest)
    newest.write_bytes(newest.read_bytes()[:-1000])
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    return tmp_path


def test_export_and_score_read_the_same_intact_checkpoint(trainer, folder, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("detectron2_nats"), "parent", logging.getLogger())
    found = Architecture.decode(trainer.model, "voted")
    read = Architecture.decode(SearchFolder(str(folder)).detector, "voted")
    assert read.layers == found.layers
    assert f"{folder}/model_final.pth is damaged" in caplog.text
    caplog.clear()
    report = score_folder(SearchFolder(str(folder)), 4)
    assert f"{folder}/model_final.pth is damaged" in caplog.text
    records = dataset_dicts(trainer.cfg, trainer.cfg.DATASETS.CALIBRATION)
    assert_report(report, trainer, some_of(records, 4))


# -- at the end of a search -----------------------------------------------------------------------


@pytest.fixture
def search(tiny_config, tmp_path, caplog):
    """A function: runs a search, and returns the trainer and what its hook said."""

    def searched(name, *opts):
        caplog.clear()
        with caplog.at_level(logging.INFO, "detectron2_nats"):
            trainer = make_trainer(tiny_config, tmp_path / name, *opts)
            trainer.train()
        said = [r.getMessage() for r in caplog.records if r.name == hooks.__name__]
        return trainer, [message for message in said if not message.startswith("alpha: ")]

    return searched


def test_a_search_ends_with_what_the_score_says(search, tmp_path):
    trainer, (report, show) = search("search", "SEARCH.SCORE_IMAGES", "4")
    records = dataset_dicts(trainer.cfg, trainer.cfg.DATASETS.CALIBRATION)
    assert_report(report, trainer, some_of(records, 4))
    assert show.endswith(f"\n  nats-show {tmp_path}/search --score 200")

    # it changes nothing; a finished search says it again
    states = torch.get_rng_state()
    _, (again, _) = search("search", "SEARCH.SCORE_IMAGES", "4")
    assert again.split(" s):")[1] == report.split(" s):")[1]
    _, (short,) = search("other")
    assert short == show.replace("/search ", "/other ")
    assert torch.equal(torch.get_rng_state(), states)
    assert_same_run(str(tmp_path / "search"), str(tmp_path / "other"))


def test_a_search_does_not_fail_by_its_score(search, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(score, "one_shot_score", fail)
    _, (warning, _) = search("search", "SEARCH.SCORE_IMAGES", "2")
    assert warning == "no score of the architecture: RuntimeError: out of memory"
    assert (tmp_path / "search/retrain.yaml").is_file()


def said_by_a_rank(config, folder, *opts):
    """What one of two processes logs of its score."""
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger(hooks.__name__)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    make_trainer(config, folder, *opts).train()
    return [message for message in said if message.startswith("Losses")]


def test_the_first_of_two_processes_scores(tiny_config, tmp_path):
    """Alone: a norm that waited there for the other one would never end."""
    opts = ["MODEL.RESNETS.NORM", "SyncBN", "SEARCH.SCORE_IMAGES", 2]
    first, second = on_two_ranks(said_by_a_rank, tiny_config, str(tmp_path), *opts)
    assert len(first) == 1 and "Plain has a higher loss than" in first[0] and not second


def test_a_run_that_freezes_is_scored_at_that_moment(search, tmp_path):
    """It changes nothing of the run, and afterwards the weights suit nothing else."""
    opts = ["MODEL.NATS.SAMPLE", True, "SEARCH.RETRAIN_WEIGHTS", "supernet"]
    opts += ["SEARCH.FREEZE_AT", 0.5]
    _, said = search("silent", *opts)
    assert not said
    trainer, (report,) = search("said", *opts, "SEARCH.SCORE_IMAGES", 2)
    assert report.startswith("Losses on 2 calibration images")
    assert_same_run(tmp_path / "silent", tmp_path / "said")
    (tmp_path / "said/config.yaml").write_text(trainer.cfg.dump())
    with pytest.raises(NATSError, match="went on to train what it found"):
        score_folder(SearchFolder(str(tmp_path / "said")), 2)
