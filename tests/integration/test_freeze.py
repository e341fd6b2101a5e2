"""A run that freezes its choice and goes on training, in this process."""

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
from detectron2_nats.engine import resumable
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


def frozen_detector(trainer):
    """The plain detector of retrain.yaml, with the weights of frozen.pth."""
    trainer.write_result()
    cfg = load_config(f"{trainer.cfg.OUTPUT_DIR}/retrain.yaml")
    model = build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def test_alpha_stops_the_weights_go_on(trainer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detectron2_nats"), "parent", logging.getLogger())
    caplog.set_level(logging.INFO)
    seen, freeze = {}, trainer.freeze
    files = set(trainer.weight_objective.loader.files)

    def keep_and_freeze():
        seen.update({k: v.clone() for k, v in trainer.model.state_dict().items()})
        freeze()

    trainer.freeze = keep_and_freeze
    trainer.train()
    assert trainer.frozen_at == 3 and trainer.alpha_start == 1
    for name, value in trainer.model.state_dict().items():
        if name.endswith(".alpha"):
            assert torch.equal(value, seen[name]) and value.any()
        elif name.endswith("conv2.weight"):
            assert not torch.equal(value, seen[name])
    both = set(trainer.weight_objective.loader.files)
    assert both == files | set(trainer.alpha_objective.loader.files) and len(both) > len(files)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.json").read_text().splitlines()]
    assert [("alpha/entropy" in line) for line in lines] == [True] * 3 + [False] * 3
    assert trainer.architecture().search["iteration"] == 3
    assert (
        "frozen after iteration 2: undecided" in caplog.text and "on all 600 images" in caplog.text
    )
    assert "frozen.pth, which this run has trained already" in caplog.text
    assert "for as long as this run took, " in caplog.text
    assert re.search("DATASETS.TRAIN .*nats_embedded_train.*nats_embedded_calibration", caplog.text)


@pytest.mark.parametrize(
    "decoding", [[], ["SEARCH.DECODE_MARGIN", 0.5], ["SEARCH.DECODE_AT_MOST", 1]]
)
def test_a_step_is_one_of_the_plain_frozen_network(tiny_config, tmp_path, decoding):
    """Losses, gradients and statistics, and the evaluation, to the bit."""
    trainer = make_trainer(tiny_config, tmp_path / "run", *FREEZES, *decoding)
    decide(trainer)
    trainer.iter = 2
    trainer.freeze()
    batch = trainer.weight_objective.next_batch()
    plain = frozen_detector(trainer)
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


def test_its_weights_are_exported_for_nothing_else(trainer):
    decide(trainer)
    trainer.iter = 2
    trainer.freeze()
    other = Architecture.decode(trainer.model, "voted", at_most=1)
    with pytest.raises(
        NATSError, match="this run froze .* and went on to train it; its weights do"
    ):
        frozen_state_dict(trainer.model, other)
    frozen_state_dict(trainer.model, trainer.architecture())


def test_weights_are_averaged_since_the_freeze(tiny_config, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detectron2_nats"), "parent", logging.getLogger())
    caplog.set_level(logging.INFO)
    make_trainer(tiny_config, tmp_path, *FREEZES, "SOLVER.AVERAGE_LAST", 1.0).train()
    assert "their mean over the last 4 iterations" in caplog.text  # what was frozen, and 3 steps


@pytest.mark.parametrize("last", [1, 3], ids=["before", "after"])
def test_resumes_bit_for_bit(tiny_config, tmp_path, last):
    make_trainer(tiny_config, tmp_path / "whole", *FREEZES).train()
    make_trainer(tiny_config, tmp_path / "part", *FREEZES).train()
    (tmp_path / "part/model_final.pth").unlink()
    for later in (3, 5):
        if later > last:
            (tmp_path / f"part/model_{later:07d}.pth").unlink(missing_ok=True)
    (tmp_path / "part/last_checkpoint").write_text(f"model_{last:07d}.pth")
    rest = make_trainer(tiny_config, tmp_path / "part", *FREEZES)
    assert rest.start_iter == last + 1 and (rest.frozen_at == 3) == (last == 3)
    rest.train()
    assert rest.frozen_at == 3
    assert_same_run(tmp_path / "whole", tmp_path / "part")


def test_freezes_as_soon_as_it_has_decided(tiny_config, tmp_path):
    opts = [*FREEZES[:-2], "SEARCH.FREEZE_WHEN_DECIDED", True, "SEARCH.ALPHA_LR", 0.0]
    undecided = make_trainer(tiny_config, tmp_path / "undecided", *opts)
    undecided.train()
    assert undecided.frozen_at is None
    decided = make_trainer(tiny_config, tmp_path / "decided", *opts)
    decide(decided)
    decided.train()
    assert decided.frozen_at == 2  # the second look is the first that sees no vote change


@pytest.mark.parametrize("opts", [["MODEL.NATS.SAMPLE", False], ["SEARCH.RETRAIN_WEIGHTS", "base"]])
def test_needs_weights_that_suit(tiny_config, tmp_path, opts):
    with pytest.raises(
        NATSError, match="FREEZE_AT .* set MODEL.NATS.SAMPLE True and SEARCH.RETRAIN"
    ):
        make_trainer(tiny_config, tmp_path / "run", *FREEZES, *opts)


def test_a_search_without_an_alpha_step_is_refused(tiny_config, tmp_path):
    with pytest.raises(NATSError, match="no α step: the search ends after 6 of 6 .* of it is 6"):
        make_trainer(tiny_config, tmp_path / "run", "SEARCH.ALPHA_START", 0.99)


def test_a_search_does_not_start_where_the_choice_is_frozen(trainer, tiny_config, tmp_path):
    decide(trainer)
    trainer.iter = 2
    trainer.freeze()
    trainer.write_result()
    torch.save({"model": trainer.model.state_dict()}, tmp_path / "frozen_run.pth")
    weights = str(tmp_path / "frozen_run.pth")
    with pytest.raises(NATSError, match="nothing is left to search: start from the frozen.pth"):
        make_trainer(tiny_config, tmp_path / "next", *FREEZES, "MODEL.WEIGHTS", weights)
    weights = str(tmp_path / "run/frozen.pth")
    started = make_trainer(tiny_config, tmp_path / "next", *FREEZES, "MODEL.WEIGHTS", weights)
    assert not any(conv.settled for conv in started.searched.values())


def test_checkpoints_of_older_versions_fit(trainer):
    """They hold no choice, of searches that froze nothing."""
    whole, optimizer = trainer.model.state_dict(), trainer.optimizer.state_dict()
    older = {name: value for name, value in whole.items() if not name.endswith(".choice")}
    assert len(older) == len(whole) - len(trainer.searched)
    assert resumable._sizes(older, optimizer) == resumable._sizes(whole, optimizer)
    trainer.model.load_state_dict(older)
    assert all(conv.settled is None for conv in trainer.searched.values())
