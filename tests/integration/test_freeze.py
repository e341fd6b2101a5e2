"""A run of two phases, search and train: it freezes its choice and goes on, in this process."""

import json
import logging
import re

import pytest
import torch
from runs import assert_same_run, make_trainer

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from detectron2_nats import Architecture, NATSError
from detectron2_nats.config import load_config
from detectron2_nats.method.layers import GroupedDilationConv2d
from detectron2_nats.method.transform import frozen_state_dict

FREEZES = ["MODEL.NATS.SAMPLE", True, "SEARCH.RETRAIN_WEIGHTS", "supernet", "SEARCH.FREEZE_AT", 0.5]
"""After three of six iterations; α steps begin after one."""


@pytest.fixture
def trainer(tiny_config, tmp_path):
    return make_trainer(tiny_config, tmp_path / "run", *FREEZES)


def decide(trainer, seed=0):
    """Give α values among which the favourites are clear."""
    generator = torch.Generator().manual_seed(seed)
    for conv in trainer.searched.values():
        conv.alpha.copy_(4 * torch.randn(conv.alpha.shape, generator=generator))


def freeze(trainer):
    """Come to the end of the search."""
    decide(trainer)
    trainer.iter = trainer.search_end
    trainer.phases.before_iteration(trainer.iter)
    assert not trainer.is_searching


def test_alpha_stops_the_weights_go_on(trainer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detectron2_nats"), "parent", logging.getLogger())
    caplog.set_level(logging.INFO)
    trainer.train()
    assert not trainer.is_searching
    assert (trainer.alpha_start, trainer.phases.start, trainer.max_iter) == (1, 3, 6)
    before, after = (
        torch.load(tmp_path / f"run/{name}.pth", weights_only=True)
        for name in ("model_0000003", "model_final")
    )
    alphas, weights = ([n for n in after["model"] if n.endswith(e)] for e in ("alpha", "2.weight"))
    assert all(torch.equal(before["model"][name], after["model"][name]) for name in alphas)
    assert not any(torch.equal(before["model"][name], after["model"][name]) for name in weights)
    train, calibration = (trainer.objectives[name].loader for name in ("weight", "alpha"))
    assert len(train.files) == 600 and set(calibration.files) < set(train.files)
    # two steps of three were taken on the search's loader, three of three on the new one
    assert (train.batches, calibration.batches) == (3, 2)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.json").read_text().splitlines()]
    assert [("alpha/entropy" in line) for line in lines] == [True] * 3 + [False] * 3
    assert trainer.architecture().search["iteration"] == 3
    assert (
        "frozen after iteration 2: undecided" in caplog.text and "on all 600 images" in caplog.text
    )
    assert "frozen.pth, which this run has trained already" in caplog.text
    assert "on as many images as this run, " in caplog.text
    assert re.search("DATASETS.TRAIN .*nats_embedded_train.*nats_embedded_calibration", caplog.text)


@pytest.mark.parametrize(
    "decoding", [[], ["SEARCH.DECODE_MARGIN", 0.5], ["SEARCH.DECODE_AT_MOST", 1]]
)
def test_a_step_is_one_of_the_plain_frozen_network(tiny_config, tmp_path, decoding):
    """Losses, gradients and statistics, and the evaluation, to the bit."""
    trainer = make_trainer(tiny_config, tmp_path / "run", *FREEZES, *decoding)
    freeze(trainer)
    batch = trainer.objectives["weight"].next_batch()
    trainer.write_result()
    cfg = load_config(str(tmp_path / "run/retrain.yaml"))
    plain = build_model(cfg)
    DetectionCheckpointer(plain).load(cfg.MODEL.WEIGHTS)
    rebuilt = build_model(trainer.cfg)  # as --eval-only does
    rebuilt.load_state_dict(trainer.model.state_dict())
    again = rebuilt.eval()(batch)[0]["instances"].scores
    assert len(again) and torch.equal(again, plain.eval()(batch)[0]["instances"].scores)
    plain.train()
    grouped = [m for m in plain.modules() if isinstance(m, GroupedDilationConv2d)]
    assert bool(grouped) == (decoding[1:] != [1])
    states = []
    for model in (trainer.model.train(), plain):
        torch.manual_seed(0)
        with EventStorage():
            losses = model(batch)
        sum(losses.values()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        buffers = {n: b for n, b in model.named_buffers() if not n.endswith(".choice")}
        detected = model.eval()(batch)[0]["instances"].get_fields()
        states.append({**losses, **gradients, **buffers, "scores": detected["scores"]})
    one, other = states
    assert one.keys() == other.keys() and len(one) > 100
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, msg=name)


def test_its_weights_suit_nothing_else_and_no_other_search(trainer, tiny_config, tmp_path):
    freeze(trainer)
    other = Architecture.decode(trainer.model, "voted", at_most=1)
    with pytest.raises(
        NATSError, match="this run froze .* and went on to train it; its weights do"
    ):
        frozen_state_dict(trainer.model, other)
    trainer.write_result()
    torch.save({"model": trainer.model.state_dict()}, tmp_path / "frozen_run.pth")
    weights = str(tmp_path / "frozen_run.pth")
    with pytest.raises(NATSError, match="nothing is left to search: start from the frozen.pth"):
        make_trainer(tiny_config, tmp_path / "next", *FREEZES, "MODEL.WEIGHTS", weights)
    weights = str(tmp_path / "run/frozen.pth")
    started = make_trainer(tiny_config, tmp_path / "next", *FREEZES, "MODEL.WEIGHTS", weights)
    assert not any(conv.settled for conv in started.searched.values())


def test_weights_are_averaged_over_the_train_phase_alone(
    tiny_config, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("detectron2_nats"), "parent", logging.getLogger())
    caplog.set_level(logging.INFO)
    make_trainer(tiny_config, tmp_path, *FREEZES, "SOLVER.AVERAGE_LAST", 1.0).train()
    assert "their mean over the last 3 iterations" in caplog.text


EARLY = [*FREEZES[:-2], "SEARCH.FREEZE_WHEN_DECIDED", True, "SEARCH.ALPHA_LR", 0.0]


@pytest.fixture(scope="module")
def whole(tiny_config, tmp_path_factory):
    """Undisturbed runs, with all their checkpoints: frozen after 3 iterations, early after 2."""
    folder = tmp_path_factory.mktemp("whole")
    keep = ["RUN.KEEP_CHECKPOINTS", 9, "SOLVER.CHECKPOINT_PERIOD", 1]
    make_trainer(tiny_config, folder / "planned", *FREEZES, *keep).train()
    early = make_trainer(tiny_config, folder / "early", *EARLY, *keep)
    decide(early)
    early.train()
    assert early.phases.start == 2  # the second look is the first that sees no vote change
    return folder


@pytest.mark.parametrize("after", [-1, 0, 1])
@pytest.mark.parametrize("kind, end, opts", [("planned", 3, FREEZES), ("early", 2, EARLY)])
def test_resumes_bit_for_bit_in_both_phases_and_between(
    whole, tiny_config, tmp_path, kind, end, opts, after
):
    last = end - 1 + after
    name = f"model_{last:07d}.pth"
    (tmp_path / name).symlink_to(whole / kind / name)
    (tmp_path / "last_checkpoint").write_text(name)
    rest = make_trainer(tiny_config, tmp_path, *opts)
    assert rest.start_iter == last + 1 and rest.is_searching == (last + 1 <= end)
    rest.train()
    assert rest.phases.start == end
    assert_same_run(whole / kind, tmp_path)


def test_a_search_that_has_not_decided_goes_on(tiny_config, tmp_path):
    undecided = make_trainer(tiny_config, tmp_path / "undecided", *EARLY)
    undecided.train()
    assert undecided.is_searching


@pytest.mark.parametrize("opts", [["MODEL.NATS.SAMPLE", False], ["SEARCH.RETRAIN_WEIGHTS", "base"]])
def test_needs_weights_that_suit(tiny_config, tmp_path, opts):
    with pytest.raises(
        NATSError, match="FREEZE_AT .* set MODEL.NATS.SAMPLE True and SEARCH.RETRAIN"
    ):
        make_trainer(tiny_config, tmp_path / "run", *FREEZES, *opts)


def test_a_search_without_an_alpha_step_is_refused(tiny_config, tmp_path):
    with pytest.raises(NATSError, match="no α step: the search ends after 6 of 6 .* of it is 6"):
        make_trainer(tiny_config, tmp_path / "run", "SEARCH.ALPHA_START", 0.99)
