"""The search step by step, in this process."""

import contextlib
import json
import logging
import math
import multiprocessing
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from runs import assert_equal, assert_same_run, make_trainer

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from detectron2_nats import Architecture, NATSError
from detectron2_nats.backbone import check_same_dilations
from detectron2_nats.commands import export
from detectron2_nats.config import load_config
from detectron2_nats.config.comparing import scaled_to_processes
from detectron2_nats.engine import resumable
from detectron2_nats.engine.resumable import ResumableTrainer
from detectron2_nats.method.decode import decode_alpha
from detectron2_nats.method.names import searched_layers
from detectron2_nats.search.folder import SearchFolder


def snapshot(trainer):
    """Copies of (weights and statistics, α, momentum buffers, Adam's state)."""
    state = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    alphas = {k: state.pop(k) for k in list(state) if k.endswith(".alpha")}
    momentum, adam = (
        {str(i): {k: torch.as_tensor(v).clone() for k, v in s.items()} for i, s in o.items()}
        for o in (
            trainer.weight_objective.optimizer.state_dict()["state"],
            trainer.alpha_objective.optimizer.state_dict()["state"],
        )
    )
    return state, alphas, momentum, adam


def steps(trainer, first, count):
    """Run some iterations without hooks."""
    with EventStorage(first) as trainer.storage:
        for trainer.iter in range(first, first + count):
            trainer.run_step()


SAMPLED = ["MODEL.NATS.SAMPLE", True]
mixed_or_sampled = pytest.mark.parametrize("opts", [[], SAMPLED], ids=["mixed", "sampled"])


@pytest.fixture
def trainer(tiny_config, tmp_path):
    return make_trainer(tiny_config, tmp_path / "run")


@pytest.fixture(params=[[], SAMPLED], ids=["mixed", "sampled"])
def either_trainer(request, tiny_config, tmp_path):
    return make_trainer(tiny_config, tmp_path / "run", *request.param)


def test_a_weight_step_leaves_alpha_bit_identical(either_trainer):
    trainer = either_trainer
    assert trainer.alpha_start == 2
    before = snapshot(trainer)
    steps(trainer, 0, 2)  # before ALPHA_START: weight steps only
    after = snapshot(trainer)
    assert_equal(before[1], after[1], "alpha")
    assert_equal(before[3], after[3], "adam")
    changed = [k for k in before[0] if not torch.equal(before[0][k], after[0][k])]
    # matrices: a norm's weight of 1 can stay the same float32 after a small step
    matrices = [n for n, p in trainer.model.named_parameters() if p.ndim > 1 and "alpha" not in n]
    assert set(matrices) <= set(changed)
    assert {k for k in before[0] if "running_mean" in k} <= set(changed)


def test_threads_are_the_runs_own_unless_the_user_sets_them(
    tiny_config, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
    make_trainer(tiny_config, tmp_path, "SOLVER.MAX_ITER", 1).train()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 2)
        make_trainer(tiny_config, tmp_path, "SOLVER.MAX_ITER", 1)  # conftest.py set OMP_NUM_THREADS
        assert torch.get_num_threads() == before + 2
        assert f"by a CPU with ABACUS, {before} threads, and now it is a CPU with" in caplog.text
        assert (
            f"ABACUS, {before + 2} threads: the run continues, but not bit for bit" in caplog.text
        )
        caplog.clear()
        monkeypatch.delenv("OMP_NUM_THREADS")
        make_trainer(tiny_config, tmp_path, "SOLVER.MAX_ITER", 1)
        assert torch.get_num_threads() == before and "not bit for bit" not in caplog.text
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SLIDE RULE")
        make_trainer(tiny_config, tmp_path, "SOLVER.MAX_ITER", 1)
        assert "and now it is a CPU with SLIDE RULE" in caplog.text
    finally:
        torch.set_num_threads(before)


def test_an_alpha_step_leaves_the_rest_bit_identical(either_trainer):
    trainer = either_trainer
    steps(trainer, 0, 1)
    trainer.model.train()
    before = snapshot(trainer)
    with EventStorage(2) as trainer.storage:
        trainer.alpha_step()
    after = snapshot(trainer)
    assert_equal(before[0], after[0], "weights and statistics")
    assert_equal(before[2], after[2], "momentum")
    assert all(not torch.equal(before[1][k], after[1][k]) for k in before[1])
    assert all(p.requires_grad for p in trainer._trained_weights)
    assert not any(conv.alpha.requires_grad for conv in trainer.searched.values())


def test_a_whole_iteration_is_a_weight_step_then_an_alpha_step(trainer, tiny_config, tmp_path):
    # batch norm statistics after run_step are those of the weight step alone
    other = make_trainer(tiny_config, tmp_path / "other")
    torch.manual_seed(0)
    steps(trainer, 2, 1)
    torch.manual_seed(0)
    with EventStorage(2) as other.storage:
        other.weight_step()
    a, b = snapshot(trainer), snapshot(other)
    assert_equal(a[0], b[0], "weights and statistics")
    assert a[1].keys() == b[1].keys()
    assert not any(torch.equal(a[1][k], b[1][k]) for k in a[1])


def test_each_parameter_is_in_one_optimizer(either_trainer):
    trainer = either_trainer
    weights = {id(p) for p in trainer.weight_objective.parameters}
    alphas = {id(p) for p in trainer.alpha_objective.parameters}
    assert not weights & alphas
    assert weights | alphas == {id(p) for p in trainer.model.parameters()}
    assert alphas == {id(c.alpha) for c in trainer.searched.values()}


def test_the_alpha_step_is_adams_first_step_on_the_calibration_loss(trainer):
    # Adam's first step moves each entry by lr against the sign of its gradient (decay 1e-5 of 0).
    steps(trainer, 0, 2)
    steps(trainer, 2, 1)
    for name, conv in trainer.searched.items():
        moved = conv.alpha.detach().abs()
        assert torch.all(moved <= trainer.cfg.SEARCH.ALPHA_LR * 1.0001), name
        assert moved.max() > 0.5 * trainer.cfg.SEARCH.ALPHA_LR, name


def test_logs_both_objectives_and_alpha(tiny_config, tmp_path):
    trainer = make_trainer(tiny_config, tmp_path / "run")
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.json").read_text().splitlines()]
    last = lines[-1]
    for key in ("total_loss", "loss_cls", "alpha/total_loss", "alpha/loss_cls", "lr"):
        assert math.isfinite(last[key]), key
    assert 0 < last["alpha/entropy"] < 1
    assert lines[0]["alpha/entropy"] == 1.0 and "alpha/total_loss" not in lines[0]
    assert sum(line["alpha/votes_changed"] for line in lines) > 0
    shares = [last[f"intensity/res5.2.conv2/{d}x{d}"] for d in (1, 3, 5)]
    assert sum(shares) == pytest.approx(1)


def test_the_result_is_what_alpha_says(tiny_config, tmp_path):
    trainer = make_trainer(tiny_config, tmp_path / "run", "SEARCH.DECODE_ORDER", "voted")
    trainer.train()
    found = Architecture.load(str(tmp_path / "run/architecture.yaml"))
    saved = torch.load(tmp_path / "run/model_final.pth", weights_only=True)["model"]
    for name, conv in searched_layers(trainer.model).items():
        alpha = saved[f"backbone.bottom_up.{name}.alpha"].numpy()
        expected = decode_alpha(alpha, conv.genotypes, conv.out_channels, "voted")
        assert found.layers[name] == expected
    assert found.search["order"] == "voted" and found.search["iteration"] == 6
    names = sorted(p.name for p in (tmp_path / "run").glob("architecture_*.yaml"))
    assert names == [f"architecture_{i:07d}.yaml" for i in (1, 3, 5)]


@mixed_or_sampled
def test_retraining_may_start_from_the_supernetworks_weights(tiny_config, tmp_path, opts):
    plain = tmp_path / "plain.yaml"
    backbone = "MODEL: {BACKBONE: {NAME: build_resnet_fpn_backbone}}"
    plain.write_text(f"_BASE_: {tiny_config}\n{backbone}\nSOLVER: {{MAX_ITER: 77}}\n")
    opts = [*opts, "SEARCH.RETRAIN_WEIGHTS", "supernet", "SEARCH.ALPHA_LR", 0.5]
    opts += ["SEARCH.RETRAIN_CONFIG", str(plain)]
    trainer = make_trainer(tiny_config, tmp_path / "run", *opts)
    trainer.train()
    found = Architecture.load(str(tmp_path / "run/architecture.yaml"))
    assert found.search["order"] == "voted"  # although DECODE_ORDER says "paper"
    assert len({run[1:] for runs in found.layers.values() for run in runs}) > 1
    retrain = load_config(str(tmp_path / "run/retrain.yaml"))
    assert retrain.MODEL.WEIGHTS == str(tmp_path / "run/frozen.pth")
    assert retrain.SOLVER.MAX_ITER == 77
    # nats-export with the folder alone writes the same once more
    (tmp_path / "run/config.yaml").write_text(trainer.given_cfg.dump())
    options = dict.fromkeys(("order", "margin", "at_most", "config_file", "weights"))
    export.main(Namespace(**options, source=f"{tmp_path}/run", output=f"{tmp_path}/again.yaml"))
    written = (tmp_path / "run/retrain.yaml").read_text()
    assert (tmp_path / "again.yaml").read_text() == written
    (tmp_path / "run/frozen.pth").rename(tmp_path / "frozen.pth")
    with pytest.raises(NATSError, match="run has no frozen.pth, .* not ended: add --weights"):
        export.main(Namespace(**options, source=f"{tmp_path}/run", output=""))
    (tmp_path / "frozen.pth").rename(tmp_path / "run/frozen.pth")
    model = build_model(retrain)
    loaded = DetectionCheckpointer(model).load(retrain.MODEL.WEIGHTS)
    check_same_dilations(retrain, loaded, "frozen.pth")
    with pytest.raises(NATSError, match="frozen.pth was trained with other dilations"):
        check_same_dilations(load_config(str(plain)), loaded, "frozen.pth")

    # a super-network whose α is one-hot in what was chosen computes the same
    for conv in trainer.searched.values():
        chosen = conv.alpha.argmax(dim=1, keepdim=True)
        conv.alpha.data.fill_(-1e4).scatter_(1, chosen, 0.0)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        searched, frozen = (m.eval().backbone(image) for m in (trainer.model, model))
    for name, features in searched.items():
        assert torch.allclose(features, frozen[name], atol=1e-4), name
    heads = {k: v for k, v in trainer.model.state_dict().items() if not k.startswith("backbone.")}
    assert_equal(heads, {k: model.state_dict()[k] for k in heads}, "heads")


def test_how_decided_a_search_is_stands_in_its_results(tiny_config, tmp_path):
    trainer = make_trainer(tiny_config, tmp_path / "run", "SEARCH.ALPHA_LR", 1e-6)
    trainer.train()
    noted = Architecture.load(str(tmp_path / "run/architecture.yaml")).search["decidedness"]
    assert noted["entropy"] == 1.0 and noted["leading"] == 0.0
    assert noted["verdict"].startswith("undecided")
    first = Architecture.load(str(tmp_path / "run/architecture_0000001.yaml")).search["decidedness"]
    assert "changed" not in first and "changed" in noted


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("DECODE_MARGIN", 1.5, "DECODE_MARGIN 1.5: expected a share"),
        ("RETRAIN_WEIGHTS", "coco", "RETRAIN_WEIGHTS 'coco': expected base or supernet"),
        ("RETRAIN_CONFIG", "configs/quickstart/base.yaml", "does not fit res3.0.conv2"),
    ],
)
def test_bad_settings_come_to_light_before_the_search(tiny_config, tmp_path, key, value, words):
    with pytest.raises(NATSError, match=words):
        make_trainer(tiny_config, tmp_path / "run", f"SEARCH.{key}", value)


@mixed_or_sampled
@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_bit_for_bit(tiny_config, tmp_path, workers, opts):
    opts = [*opts, "DATALOADER.NUM_WORKERS", workers]
    whole = make_trainer(tiny_config, tmp_path / "whole", *opts)
    whole.train()
    part = make_trainer(tiny_config, tmp_path / "part", *opts)
    part.max_iter = 5  # dies after iteration 4; the last checkpoint is that of iteration 3
    part._hooks = [h for h in part._hooks if type(h).__name__ != "EvalHook"]
    part.save_checkpoint, save = lambda name: save(name) if "final" not in name else None, (
        part.save_checkpoint
    )
    part.train()
    rest = make_trainer(tiny_config, tmp_path / "part", *opts)
    assert rest.start_iter == 4
    rest.train()
    assert_same_run(tmp_path / "whole", tmp_path / "part")


def test_retraining_resumes_bit_for_bit_and_evaluation_changes_nothing(tiny_config, tmp_path):
    plain = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]
    test = ["DATASETS.TEST", "('nats_embedded_val',)", "TEST.EVAL_PERIOD", 2]
    whole = make_trainer(tiny_config, tmp_path / "whole", *plain, kind="train")
    whole.train()
    part = make_trainer(tiny_config, tmp_path / "part", *plain, *test, kind="train")
    part.test = lambda cfg, model: torch.rand(3) is None or {}  # draws random numbers
    part.train()
    (tmp_path / "part/model_final.pth").unlink()
    (tmp_path / "part/last_checkpoint").write_text("model_0000003.pth")
    rest = make_trainer(tiny_config, tmp_path / "part", *plain, kind="train")
    rest.train()
    assert_same_run(tmp_path / "whole", tmp_path / "part")


def test_weights_are_averaged_over_the_last_iterations_also_after_a_resume(tiny_config, tmp_path):
    plain = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "SOLVER.CHECKPOINT_PERIOD", 1]
    average = [*plain, "SOLVER.AVERAGE_LAST", 0.5]  # the last 3 of 6 iterations
    last = make_trainer(tiny_config, tmp_path / "last", *plain, kind="train")
    last.train()
    files = ["model_0000003.pth", "model_0000004.pth", "model_final.pth"]
    models = [torch.load(tmp_path / "last" / f, weights_only=True)["model"] for f in files]
    whole = make_trainer(tiny_config, tmp_path / "whole", *average, kind="train")
    whole.train()
    averaged = torch.load(tmp_path / "whole/model_final.pth", weights_only=True)["model"]
    for name, value in averaged.items():
        if value.is_floating_point():
            mean = torch.stack([m[name].double() for m in models]).mean(dim=0)
            torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-7)
    assert not torch.equal(
        averaged["backbone.fpn_output2.weight"], models[-1]["backbone.fpn_output2.weight"]
    )

    (tmp_path / "whole/model_final.pth").rename(tmp_path / "kept.pth")
    (tmp_path / "whole/last_checkpoint").write_text("model_0000004.pth")
    make_trainer(tiny_config, tmp_path / "whole", *average, kind="train").train()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept.pth").rename(tmp_path / "kept/model_final.pth")
    assert_same_run(tmp_path / "kept", tmp_path / "whole")


# -- the rehearsal of the α step ------------------------------------------------------------------

RETINANET = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 5]
RETINANET += ["MODEL.NATS.BASE_BACKBONE", "build_retinanet_resnet_fpn_backbone"]
RETINANET += ["MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']", "MODEL.FPN.NORM", ""]


@pytest.mark.parametrize(
    "opts",
    [
        [],
        ["DATALOADER.NUM_WORKERS", 2],
        ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", ""],
        ["SOLVER.AMP.ENABLED", True],
        RETINANET,
        SAMPLED,
    ],
    ids=["BN", "loader processes", "FrozenBN", "float16", "RetinaNet", "sampled"],
)
def test_a_rehearsal_changes_nothing(tiny_config, tmp_path, opts):
    opts = [*opts, "SOLVER.MAX_ITER", 4]  # the second has the first α step
    rehearsed = make_trainer(tiny_config, tmp_path / "rehearsed", *opts)
    seen, rehearse = [], rehearsed.rehearse_alpha_step
    rehearsed.rehearse_alpha_step = lambda: seen.append(snapshot(rehearsed)) or rehearse()
    rehearsed.before_train = lambda: seen.append(snapshot(rehearsed)) or [
        hook.before_train() for hook in rehearsed._hooks
    ]
    rehearsed.train()
    before, after = seen
    for part, (a, b) in enumerate(zip(before, after)):
        assert_equal(a, b, f"part {part}")

    plain = make_trainer(tiny_config, tmp_path / "plain", *opts)
    plain.rehearse_alpha_step = lambda: None
    plain.train()
    for name in ("model_0000001.pth", "model_final.pth"):
        assert_same_run(tmp_path / "plain", tmp_path / "rehearsed", name)
    one, other = (
        [json.loads(line) for line in (tmp_path / name / "metrics.json").read_text().splitlines()]
        for name in ("plain", "rehearsed")
    )
    assert len(one) == 4
    for a, b in zip(one, other):
        assert a.keys() == b.keys()
        assert all(a[key] == b[key] for key in a if "time" not in key and key != "eta_seconds")


def test_a_rehearsal_leaves_no_gradients_and_says_what_it_took(trainer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detectron2_nats"), "parent", logging.getLogger())
    caplog.set_level(logging.INFO)
    trainer.rehearse_alpha_step()
    assert all(p.grad is None for p in trainer.model.parameters())
    assert not any(conv.alpha.requires_grad for conv in trainer.searched.values())
    (line,) = [r.getMessage() for r in caplog.records if "One α step takes" in r.getMessage()]
    assert re.fullmatch(
        r"α steps start at iteration 2. One α step takes [\d.]+ s, peak memory \d+ MiB", line
    )


@pytest.mark.parametrize("start", [0, 1, 2])
def test_the_rehearsal_comes_before_the_first_alpha_step_only(tiny_config, tmp_path, start):
    trainer = make_trainer(tiny_config, tmp_path, "SOLVER.MAX_ITER", 5)  # the first is the third
    seen = []
    trainer.rehearse_alpha_step = lambda: seen.append(trainer.start_iter)
    trainer.start_iter = start
    trainer.train()
    assert seen == [start] * (start < 2)


def test_unreadable_calibration_data_shows_at_the_start(tiny_config, tmp_path):
    """What a look at the files' heads does not find, the rehearsed α step does."""
    name = "nats_test_unreadable"
    records = DatasetCatalog.get("nats_embedded_calibration")
    cut = tmp_path / "cut.png"
    first = records[0]
    cut.write_bytes(Path(first["file_name"]).read_bytes()[:9000])
    bad = [
        dict(r, file_name=str(cut), width=first["width"], height=first["height"]) for r in records
    ]
    DatasetCatalog.register(name, lambda: bad)
    try:
        trainer = make_trainer(tiny_config, tmp_path, "DATASETS.CALIBRATION", f"('{name}',)")
        with pytest.raises(NATSError, match="20 images in a row .*cut.png: "):
            trainer.train()
        for record in bad:
            record["file_name"] = "nowhere.png"
        with pytest.raises(NATSError, match="200 of 200 .* nowhere.png: there is no such file"):
            make_trainer(tiny_config, tmp_path, "DATASETS.CALIBRATION", f"('{name}',)")
    finally:
        DatasetCatalog.remove(name)
    assert not trainer.weight_objective.optimizer.state  # no step was taken


def test_an_error_in_the_alpha_step_shows_at_the_start(trainer):
    def forward(batch):
        raise RuntimeError("out of memory")

    trainer.alpha_objective.losses = forward
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert not trainer.weight_objective.optimizer.state


# -- random numbers of the GPU --------------------------------------------------------------------


def test_cudas_generators_keep_each_ranks_own_seed(tiny_config, tmp_path, monkeypatch):
    """Detectron2 samples proposals by them."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    trainer = make_trainer(tiny_config, tmp_path / "one")
    # as make_trainer, or default_setup on each rank; Detectron2's newest does it twice, once by str
    assert set(map(int, seeds)) == {trainer.cfg.SEED}
    other = make_trainer(tiny_config, tmp_path / "other")
    assert_equal(snapshot(trainer)[0], snapshot(other)[0], "the start")


def test_the_random_states_are_those_of_the_models_gpu(trainer, monkeypatch):
    states = {torch.device("cuda:1"): torch.tensor([1])}
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, gpu: states.update({gpu: state}))
    trainer._device = torch.device("cuda:1")
    trainer.save_checkpoint("model_0000001")
    states.clear()
    trainer.resume_or_load()
    assert states == {torch.device("cuda:1"): torch.tensor([1])}


# -- numbers going wrong ----------------------------------------------------------------------


def break_losses(trainer, monkeypatch, iterations, how):
    """Make the losses of some iterations NaN, by value or by Detectron2's own exception."""
    plain = trainer.model.forward

    def forward(batch):
        losses = plain(batch)
        if trainer.iter in iterations:
            if how == "raise":
                raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
            losses["loss_cls"] = losses["loss_cls"] * math.nan
        return losses

    monkeypatch.setattr(trainer.model, "forward", forward)


@pytest.mark.parametrize("how", ["value", "raise"])
@pytest.mark.parametrize("good", [3, 0])
def test_a_step_with_nan_is_not_taken(trainer, monkeypatch, good, how):
    """Also in the first step after a start or a resume."""
    steps(trainer, 3 - good, good)
    before = snapshot(trainer)
    break_losses(trainer, monkeypatch, {3}, how)
    steps(trainer, 3, 1)
    after = snapshot(trainer)
    for part, (a, b) in enumerate(zip(before, after)):
        assert_equal(a, b, f"part {part}")
    assert (trainer.weight_objective.bad_total, trainer.alpha_objective.bad_total) == (1, 1)
    steps(trainer, 4, 1)
    assert (trainer.weight_objective.bad_in_row, trainer.weight_objective.bad_total) == (0, 1)
    assert not torch.equal(
        snapshot(trainer)[1]["backbone.bottom_up.res5.0.conv2.alpha"],
        after[1]["backbone.bottom_up.res5.0.conv2.alpha"],
    )


def test_a_gradient_that_is_not_finite_is_not_applied(trainer):
    before = snapshot(trainer)
    bias = trainer.model.roi_heads.box_predictor.cls_score.bias
    handle = bias.register_hook(lambda gradient: gradient * math.inf)
    steps(trainer, 0, 1)
    handle.remove()
    assert_equal(before[0], snapshot(trainer)[0], "weights and statistics")
    assert trainer.weight_objective.bad_total == 1


def test_stops_after_too_many_bad_steps_in_a_row(tiny_config, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_config, tmp_path / "run", "RUN.MAX_BAD_STEPS", 2)
    break_losses(trainer, monkeypatch, {2, 3, 4, 5}, "value")
    with pytest.raises(
        NATSError, match="2 weight steps in a row.*up to iteration 3.*model_0000001"
    ):
        trainer.train()
    saved = torch.load(tmp_path / "run/model_0000001.pth", weights_only=True)["model"]
    assert all(v.isfinite().all() for v in saved.values() if v.is_floating_point())


@pytest.mark.parametrize("how", ["to the end", "to an error"])
def test_training_leaves_no_loader_processes(tiny_config, tmp_path, monkeypatch, how):
    """Python's garbage collector would cut their queues, then wait 10 s for each."""
    before = set(multiprocessing.active_children())
    opts = ["DATALOADER.NUM_WORKERS", 2, "SOLVER.MAX_ITER", 4, "RUN.MAX_BAD_STEPS", 1]
    trainer = make_trainer(tiny_config, tmp_path / "run", *opts)
    if how == "to an error":
        break_losses(trainer, monkeypatch, {3}, "value")
        with pytest.raises(NATSError, match="weight steps? in a row"):
            trainer.train()
    else:
        trainer.train()
    assert set(multiprocessing.active_children()) <= before


# -- precision, clipping, scaling -----------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_mixed_precision(tiny_config, tmp_path, precision):
    opts = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", precision]
    trainer = make_trainer(tiny_config, tmp_path / "run", *opts)
    seen = []
    conv = trainer.searched["res4.0.conv2"]
    conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    before = snapshot(trainer)
    for iteration in range(2, 12):  # float16 looks for its loss scale first
        steps(trainer, iteration, 1)
    after = snapshot(trainer)
    assert set(seen) == {getattr(torch, precision)}
    assert trainer.weight_objective.scaler.is_enabled() == (precision == "float16")
    assert trainer.weight_objective.bad_total == trainer.alpha_objective.bad_total == 0
    assert not torch.equal(
        before[1]["backbone.bottom_up.res5.0.conv2.alpha"],
        after[1]["backbone.bottom_up.res5.0.conv2.alpha"],
    )
    key = "backbone.bottom_up.res5.0.conv2.replicas"
    assert not torch.equal(before[0][key], after[0][key]) and after[0][key].isfinite().all()


def test_gradient_clipping_bounds_the_weight_step(tiny_config, tmp_path):
    clip = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1e-6]
    opts = ["SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.WARMUP_ITERS", 0]
    trainer = make_trainer(tiny_config, tmp_path / "run", *clip, *opts)
    before = snapshot(trainer)[0]
    steps(trainer, 0, 1)
    after = snapshot(trainer)[0]
    for name, _ in trainer.model.named_parameters():
        if "alpha" not in name:
            assert (after[name] - before[name]).abs().max() <= 0.01 * 1e-6 * 1.01 + 1e-7, name


def test_reference_world_size_scales_our_keys_too(tiny_config, tmp_path):
    reference = ["SOLVER.REFERENCE_WORLD_SIZE", 2, "SEARCH.ALPHA_IMS_PER_BATCH", 4]
    cfg = make_trainer(tiny_config, tmp_path / "run", *reference).cfg
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER) == (1, 12)
    assert cfg.SOLVER.BASE_LR == pytest.approx(0.005)
    assert cfg.SOLVER.BASE_LR_END == pytest.approx(0.00005)
    assert cfg.SEARCH.ALPHA_IMS_PER_BATCH == 2
    assert cfg.SEARCH.ALPHA_LR == pytest.approx(0.005)  # twice as many α steps: as far as before


def test_a_small_batch_of_the_alpha_step_is_not_scaled_to_none(tiny_config):
    """0 would mean as many images as for a weight step."""
    for given, expected in ((1, 1), (0, 0)):
        opts = ["SOLVER.REFERENCE_WORLD_SIZE", 8, "SEARCH.ALPHA_IMS_PER_BATCH", given]
        cfg = load_config(tiny_config, [*opts, "SOLVER.IMS_PER_BATCH", 16])
        assert scaled_to_processes(cfg, 1).SEARCH.ALPHA_IMS_PER_BATCH == expected


def as_on_processes(count, monkeypatch):
    """Scale the config as on so many processes; all the rest is one process's."""
    monkeypatch.setattr(
        resumable, "scaled_to_processes", lambda cfg, _: scaled_to_processes(cfg, count)
    )


def rates(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: line["lr"] for line in lines}


SCALED = ["SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.AVERAGE_LAST", 0.7]


@pytest.mark.parametrize("kind", ["search", "train"])
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (2, 3)])
def test_goes_on_with_another_number_of_processes(
    tiny_config, tmp_path, monkeypatch, before, after, kind
):
    """Of 6 iterations with 4 images: 12 with 2, 4 with 6. At the same image, at the same rate."""
    plain = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"] if kind == "train" else []
    opts = [*SCALED, *plain]
    with monkeypatch.context() as patch:
        as_on_processes(before, patch)
        first = make_trainer(tiny_config, tmp_path / "run", *opts, kind=kind)
        first._hooks = first._hooks[:-1]  # no writer
        half, step = first.max_iter * 2 // 3, first.run_step
        first.run_step = lambda: 1 / 0 if first.iter == half else step()  # dies there
        with pytest.raises(ZeroDivisionError):
            first.train()

    as_on_processes(after, monkeypatch)
    whole = make_trainer(tiny_config, tmp_path / "whole", *opts, kind=kind)
    whole.train()
    rest = make_trainer(tiny_config, tmp_path / "run", *opts, kind=kind)
    start = rest.start_iter
    assert start / rest.max_iter == pytest.approx(2 / 3, abs=0.1)
    images = rest.cfg.SOLVER.IMS_PER_BATCH
    assert images == 2 * after
    if kind == "search":
        (adam,) = rest.alpha_objective.optimizer.param_groups
        assert adam["lr"] == rest.cfg.SEARCH.ALPHA_LR == pytest.approx(0.01 * after / 2)
    assert abs(start * images - half * first.cfg.SOLVER.IMS_PER_BATCH) <= images / 2
    for old, new in zip(first.objectives().values(), rest.objectives().values()):
        seen = new.loader.batches * images
        assert abs(seen - old.loader.batches * first.cfg.SOLVER.IMS_PER_BATCH) <= images / 2
    rest.train()
    expected = rates(tmp_path / "whole")
    assert rates(tmp_path / "run") == {i: expected[i] for i in expected if i >= start}
    averages = [next(h for h in t._hooks if hasattr(h, "_means")) for t in (whole, rest)]
    assert abs(averages[0]._count - averages[1]._count) <= 1


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "opts, words",
    [
        (["SEARCH.ALPHA_START", 1.0], "ALPHA_START 1.0"),
        (["DATASETS.CALIBRATION", "('nats_embedded_train',)"], "share .* images"),
        (["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"], "nothing to search"),
        (["SOLVER.IMS_PER_BATCH", 0], "batch of 0 images"),
        (["DATALOADER.SAMPLER_TRAIN", "Magic"], "SAMPLER_TRAIN 'Magic'"),
        (["SEARCH.RETRAIN_CONFIG", "nowhere.yaml"], "SEARCH.RETRAIN_CONFIG: config nowhere.yaml"),
        (["RUN.KEEP_CHECKPOINTS", 0], "KEEP_CHECKPOINTS 0: expected at least 1"),
        (["RUN.LOG_PERIOD", 0], "LOG_PERIOD 0: expected at least 1"),
        (["RUN.RANK_CHECK_PERIOD", 0], "RANK_CHECK_PERIOD 0: expected at least 1"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "weights not found: nowhere.pth"),
        (["MODEL.BACKBONE.FREEZE_AT", 3], "stage res3 is frozen .*FREEZE_AT"),
        (["MODEL.NATS.NUM_GROUPS", 5], "NUM_GROUPS 5 does not divide"),
        (["MODEL.NATS.CHANNELS_PER_GROUP", 4, "MODEL.NATS.NUM_GROUPS", 8], "both NUM_GROUPS"),
    ],
)
def test_bad_input_is_named_before_training(tiny_config, tmp_path, opts, words):
    with pytest.raises(NATSError, match=words):
        make_trainer(tiny_config, tmp_path / "run", *opts)


@pytest.mark.parametrize(
    "kind, test, words",
    [
        ("search", "train", ["TEST and DATASETS.TRAIN share 400 images"]),
        ("search", "calibration", ["TEST and DATASETS.CALIBRATION share 200 images"]),
        ("train", "train", ["TEST and DATASETS.TRAIN share 400 images"]),
        ("train", "calibration", []),
    ],
)
def test_test_images_among_the_others(
    tiny_config, tmp_path, caplog, monkeypatch, kind, test, words
):
    monkeypatch.setattr(logging.getLogger("detectron2_nats"), "parent", logging.getLogger())
    make_trainer(tiny_config, tmp_path, "DATASETS.TEST", f"('nats_embedded_{test}',)", kind=kind)
    found = [r.getMessage() for r in caplog.records if r.getMessage().startswith("DATASETS.TEST")]
    assert len(found) == len(words) and all(w in line for w, line in zip(words, found))


def test_refuses_the_folder_of_another_search(tiny_config, tmp_path):
    make_trainer(tiny_config, tmp_path / "run").train()
    with pytest.raises(
        NATSError, match="contains a search with other settings: .*MODEL.NATS.SPACE: 'A', now 'B'"
    ):
        make_trainer(tiny_config, tmp_path / "run", "MODEL.NATS.SPACE", "B")
    # what does not change the result may change
    again = make_trainer(tiny_config, tmp_path / "run", "DATALOADER.NUM_WORKERS", 1)
    assert again.start_iter == 6


def test_a_training_goes_on_at_the_rate_that_it_is_resumed_with(tiny_config, tmp_path):
    """The checkpoint contains the optimizer's old one."""
    plain = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "SOLVER.WARMUP_ITERS", 0]
    first = make_trainer(tiny_config, tmp_path, *plain, kind="train")
    first._hooks = first._hooks[:-1]  # no writer
    step = first.run_step
    first.run_step = lambda: 1 / 0 if first.iter == 2 else step()  # dies there
    with pytest.raises(ZeroDivisionError):
        first.train()
    (old,) = {group["lr"] for group in first.optimizer.param_groups}
    changed = ["SOLVER.BASE_LR", 0.001, "SOLVER.BASE_LR_END", 1e-5, "SOLVER.WEIGHT_DECAY", 0.5]
    rest = make_trainer(tiny_config, tmp_path, *plain, *changed, kind="train")
    assert rest.start_iter == 2
    groups = rest.optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([old / 10] * len(groups))
    assert 0.5 in {group["weight_decay"] for group in groups}
    same = make_trainer(tiny_config, tmp_path, *plain, kind="train")
    assert {group["lr"] for group in same.optimizer.param_groups} == {old}


@pytest.mark.parametrize(
    "changed",
    [
        ["MODEL.BACKBONE.FREEZE_AT", 3],  # fewer parameters
        ["MODEL.RESNETS.NORM", "FrozenBN"],  # none of the norms'
        ["MODEL.ROI_BOX_HEAD.FC_DIM", 16],  # of another shape
    ],
)
def test_a_training_is_not_resumed_with_other_parameters(tiny_config, tmp_path, changed):
    plain = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]
    make_trainer(tiny_config, tmp_path, *plain, kind="train").save_checkpoint("model_0000001")
    with pytest.raises(NATSError, match="is of other parameters: .* another OUTPUT_DIR"):
        make_trainer(tiny_config, tmp_path, *plain, *changed, kind="train")


def test_a_new_run_leaves_an_earlier_ones_checkpoints_alone(tiny_config, tmp_path):
    """It would prune them by their numbers, and a resume would take them for its own."""
    trainer = make_trainer(tiny_config, tmp_path)
    trainer.save_checkpoint("model_0000001")
    with pytest.raises(NATSError, match="contains checkpoints of an earlier run: .* --resume"):
        trainer.resume_or_load(resume=False)


def test_checkpoints_are_pruned_and_unfinished_ones_deleted(tiny_config, tmp_path):
    unfinished = tmp_path / ".model_0000001.pth.abc"  # of a process that was killed in the middle
    unfinished.write_bytes(b"half")
    opts = ["RUN.KEEP_CHECKPOINTS", 1, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", 4]
    trainer = make_trainer(tiny_config, tmp_path, *opts)
    assert not unfinished.exists()
    trainer.train()
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "model_0000002.pth",
        "model_final.pth",
    ]


def test_weights_that_match_nothing_are_an_error(tiny_config, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"model": {"features.0.weight": torch.zeros(3)}}, path)
    with pytest.raises(NATSError, match="match nothing in the backbone.*features.0.weight"):
        make_trainer(tiny_config, tmp_path / "run", "MODEL.WEIGHTS", str(path))


@pytest.mark.parametrize("fails", [False, True])
def test_no_evaluation_after_a_last_step_that_failed(tiny_config, tmp_path, fails):
    """The other ranks would not come to it."""
    trainer = make_trainer(tiny_config, tmp_path, "SOLVER.MAX_ITER", 2)
    step, evaluations = trainer.run_step, []
    trainer.test = lambda *_: evaluations.append(trainer.iter)

    def run_step():
        step()
        if fails and trainer.iter == 1:
            raise RuntimeError("out of memory")

    trainer.run_step = run_step
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        trainer.train()
    assert len(evaluations) == (0 if fails else 1)


def test_the_trainers_are_detectron2s():
    from detectron2.engine import DefaultTrainer
    from detectron2_nats import SearchTrainer

    assert issubclass(SearchTrainer, ResumableTrainer) and issubclass(SearchTrainer, DefaultTrainer)
    assert Path(SearchTrainer.__module__.replace(".", "/")).name == "trainer"


def test_plain_detectron2s_checkpoint_is_not_resumed_from(tiny_config, tmp_path):
    trainer = make_trainer(tiny_config, tmp_path / "run")
    DetectionCheckpointer(trainer.model, str(tmp_path / "run")).save("model_0000001", iteration=1)
    with pytest.raises(NATSError, match="model_0000001.pth cannot be resumed from: .*OUTPUT_DIR"):
        make_trainer(tiny_config, tmp_path / "run")


def test_convs_inside_and_outside_of_the_stages(tiny_config, tmp_path):
    """Searched by MODEL.NATS.CONVS, exported, retrained, limited to one dilation."""
    folder = tmp_path / "search"
    convs = ["MODEL.NATS.CONVS", "['fpn_output[23]', 'res5.[01].*']"]
    make_trainer(tiny_config, folder, *convs).train()
    found = Architecture.load(str(folder / "architecture.yaml"))
    names = ["fpn_output2", "fpn_output3", *(f"res5.{i}.conv2" for i in range(3))]
    assert sorted(found.layers) == sorted(names)
    assert found.layers["res5.2.conv2"] == ((64, 1, 1),)
    weights = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    alphas = {k: v for k, v in weights.items() if k.endswith(".alpha")}
    # FPN calls its output convs from a list of its own
    assert len(alphas) == 4 and all(alpha.any() for alpha in alphas.values())

    again = make_trainer(str(folder / "retrain.yaml"), tmp_path / "retrain", kind="retrain")
    again.train()
    (folder / "config.yaml").write_text(load_config(tiny_config, convs).dump())
    search = SearchFolder(str(folder))
    for conv in searched_layers(search.supernet[1]).values():
        conv.alpha.data.normal_()
    one = search.decode("voted", at_most=1)
    assert all(len(segments) == 1 for segments in one.layers.values())
    assert one.search["at_most"] == 1


def test_a_conv_on_which_no_loss_depends(tiny_config, tmp_path):
    """Nothing would train its α, and it would be called plain without a word."""
    opts = ["MODEL.NATS.CONVS", "['fpn_output[23]']"]
    opts += ["MODEL.RPN.IN_FEATURES", "['p3', 'p4', 'p5', 'p6']"]
    opts += ["MODEL.ANCHOR_GENERATOR.SIZES", "[[32], [64], [96], [128]]"]
    opts += ["MODEL.ROI_HEADS.IN_FEATURES", "['p3', 'p4', 'p5']"]
    with pytest.raises(NATSError, match="the loss does not depend on fpn_output2: "):
        make_trainer(tiny_config, tmp_path, *opts).train()
