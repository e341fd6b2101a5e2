"""The one-shot score against the decoded network that it stands for."""

import json
import logging

import numpy as np
import pytest
import torch
from runs import TINY, make_trainer

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from detectron2_nats.bench.baselines import random_architecture
from detectron2_nats.commands import export, score
from detectron2_nats.config import load_config
from detectron2_nats.errors import NATSError
from detectron2_nats.method.architecture import Architecture
from detectron2_nats.search.export import export_config, frozen_weights, searched_detector
from detectron2_nats.search.score import field_verdict, one_shot_score, scoring_batches


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
    from detectron2_nats.engine.loader import dataset_dicts

    records = dataset_dicts(trainer.cfg, trainer.cfg.DATASETS.CALIBRATION)[:4]
    return scoring_batches(trainer.cfg, records)


def test_score_is_the_loss_of_the_decoded_network(trainer, batches):
    found = Architecture.decode(trainer.model, "voted")
    frozen = build_model(export_config(searched_detector(trainer.cfg), found))
    weights = frozen_weights(trainer.model.state_dict(), trainer.model.backbone, found)
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


def test_an_architecture_of_another_space_is_refused(trainer, batches):
    strange = Architecture({n: [(c.out_channels, 7, 7)] for n, c in trainer.searched.items()})
    with pytest.raises(NATSError, match=r"res3\.0\.conv2: .* channel group 0 .*\(7, 7\)"):
        one_shot_score(trainer.model, strange, batches)
    with pytest.raises(NATSError, match=r"res3\.0\.conv2: 3 channels in the architecture"):
        one_shot_score(trainer.model, Architecture({"res3.0.conv2": [(3, 1, 1)]}), batches)


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


def test_the_command_scores_one_dilation_everywhere_too(trainer, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "search"
    folder.mkdir()
    (folder / "config.yaml").write_text(trainer.cfg.dump())
    torch.save({"model": trainer.model.state_dict()}, folder / "model_final.pth")
    (folder / "last_checkpoint").write_text("model_final.pth")
    found = Architecture.decode(trainer.model, "voted")
    mine, other = (str(tmp_path / part / "architecture.yaml") for part in ("mine", "other"))
    found.save(mine)
    random_architecture(trainer.cfg, 0).save(other)
    options = ["--random", "2", "--images", "2", "--architecture", mine, "--architecture", other]
    written = ["--write", str(tmp_path / "candidates")]
    monkeypatch.setattr("sys.argv", ["score.py", str(folder), *options, *written])
    score.run()
    scores = json.loads((folder / "scores.json").read_text())
    common = set.intersection(*(set(conv.genotypes) for conv in trainer.searched.values()))
    wider = common - {(1, 1)}
    assert wider
    uniform = {"plain"} | {f"all {h}x{w}" for h, w in wider}
    assert set(scores) == {"found", mine, other, "random 0", "random 1"} | uniform
    assert scores[mine] == scores["found"] != scores["plain"]
    assert scores[other] == scores["random 0"]
    worse = sum(scores["plain"] > scores[f"random {seed}"] for seed in range(2))
    assert f"Plain has a higher loss than {worse} of 2 random" in capsys.readouterr().out
    names = {name.replace(" ", "_") for name in set(scores) - {mine, other}}
    assert {path.stem for path in (tmp_path / "candidates").iterdir()} == names
    for h, w in wider:
        written = Architecture.load(str(tmp_path / "candidates" / f"all_{h}x{w}.yaml"))
        assert {segment[1:] for layer in written.layers.values() for segment in layer} == {(h, w)}


def test_a_folder_without_a_checkpoint_is_no_search(trainer, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text(trainer.cfg.dump())
    monkeypatch.setattr("sys.argv", ["score.py", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        score.run()
    assert left.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path} contains no checkpoint: search first\n"


def test_export_and_score_fall_back_to_the_same_checkpoint(trainer, tmp_path, monkeypatch, caplog):
    """If the newest one is damaged, both read the one before it, with a warning."""
    folder = tmp_path / "search"
    folder.mkdir()
    (folder / "config.yaml").write_text(trainer.cfg.dump())
    state_dict = trainer.model.state_dict()
    torch.save({"model": state_dict}, folder / "model_0000003.pth")
    found = Architecture.decode(trainer.model, "voted")
    found.save(str(folder / "architecture.yaml"))
    other = {k: -v if k.endswith(".alpha") else v for k, v in state_dict.items()}
    newest = folder / "model_final.pth"
    torch.save({"model": other}, newest)
    newest.write_bytes(newest.read_bytes()[:-1000])
    (folder / "last_checkpoint").write_text("model_final.pth")
    monkeypatch.setattr(logging.getLogger("detectron2_nats"), "parent", logging.getLogger())
    config, candidates = str(tmp_path / "voted.yaml"), tmp_path / "candidates"
    for command, options in (
        (export, ["--order", "voted", "--output", config]),
        (score, ["--random", "1", "--images", "2", "--write", str(candidates)]),
    ):
        caplog.clear()
        monkeypatch.setattr("sys.argv", ["nats", str(folder), *options])
        command.run()
        assert f"{newest} is damaged" in caplog.text
    exported = Architecture.from_config(load_config(config).MODEL.NATS.ARCHITECTURE)
    scored = Architecture.load(str(candidates / "found.yaml"))
    assert exported.layers == scored.layers == found.layers
