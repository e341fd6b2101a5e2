"""The search step by step, in this process."""

import contextlib
import json
import math
import multiprocessing
from argparse import Namespace

import pytest
import torch
from runs import assert_equal, assert_same_run, make_trainer

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from detectron2_nats import Architecture, NATSError
from detectron2_nats.commands import export
from detectron2_nats.config import load_config
from detectron2_nats.engine.machine import scaled_to_processes
from detectron2_nats.engine.weights import check_same_dilations
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
            trainer.objectives["weight"].optimizer.state_dict()["state"],
            trainer.objectives["alpha"].optimizer.state_dict()["state"],
        )
    )
    return state, alphas, momentum, adam


def steps(trainer, first, count):
    """Run some iterations without hooks."""
    with EventStorage(first) as trainer.storage:
        for trainer.iter in range(first, first + count):
            trainer.run_step()


# keeps a running mean of positive anchors, in no state dict
RETINANET = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 5]
RETINANET += ["MODEL.NATS.BASE_BACKBONE", "build_retinanet_resnet_fpn_backbone"]
RETINANET += ["MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']", "MODEL.FPN.NORM", ""]

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


def test_threads_are_the_runs_own_unless_the_user_sets_them(trainer, tmp_path, caplog, monkeypatch):
    trainer.save_checkpoint("model_0000001")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 2)
        trainer.resume_or_load()  # conftest.py set OMP_NUM_THREADS
        assert torch.get_num_threads() == before + 2
        assert f"{before + 2} threads: the run continues, but not bit for bit" in caplog.text
        caplog.clear()
        monkeypatch.delenv("OMP_NUM_THREADS")
        trainer.resume_or_load()
        assert torch.get_num_threads() == before and "not bit for bit" not in caplog.text
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("either_trainer", [[], [*RETINANET, *SAMPLED]], indirect=True)
def test_an_alpha_step_leaves_the_rest_bit_identical(either_trainer):
    trainer = either_trainer
    steps(trainer, 0, 1)
    trainer.model.train()
    before, normalizer = snapshot(trainer), getattr(trainer.model, "loss_normalizer", None)
    with EventStorage(2) as trainer.storage:
        trainer.take_step("alpha")
    after = snapshot(trainer)
    assert getattr(trainer.model, "loss_normalizer", None) == normalizer
    assert_equal(before[0], after[0], "weights and statistics")
    assert_equal(before[2], after[2], "momentum")
    assert all(not torch.equal(before[1][k], after[1][k]) for k in before[1])
    assert all(p.requires_grad for p in trainer.objectives["weight"].parameters)
    assert not any(conv.alpha.requires_grad for conv in trainer.searched.values())


def test_a_whole_iteration_is_a_weight_step_then_an_alpha_step(trainer, tiny_config, tmp_path):
    # batch norm statistics after run_step are those of the weight step alone
    other = make_trainer(tiny_config, tmp_path / "other")
    torch.manual_seed(0)
    steps(trainer, 2, 1)
    torch.manual_seed(0)
    with EventStorage(2) as other.storage:
        other.take_step("weight")
    a, b = snapshot(trainer), snapshot(other)
    assert_equal(a[0], b[0], "weights and statistics")
    assert a[1].keys() == b[1].keys()
    assert not any(torch.equal(a[1][k], b[1][k]) for k in a[1])


def test_each_parameter_is_in_one_optimizer(either_trainer):
    trainer = either_trainer
    weights = {id(p) for p in trainer.objectives["weight"].parameters}
    alphas = {id(p) for p in trainer.objectives["alpha"].parameters}
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
    opts = ["SEARCH.ALPHA_LR", 1e-6, "SOLVER.CHECKPOINT_PERIOD", 1]
    make_trainer(tiny_config, tmp_path / "run", *opts).train()
    noted = Architecture.load(str(tmp_path / "run/architecture.yaml")).search["decidedness"]
    assert noted["entropy"] == 1.0 and noted["leading"] == 0.0
    assert noted["verdict"].startswith("undecided")
    first = Architecture.load(str(tmp_path / "run/architecture_0000000.yaml")).search["decidedness"]
    assert "changed" not in first and "changed" in noted


@pytest.mark.parametrize(
    "opts",
    [["DATALOADER.NUM_WORKERS", 2], [*RETINANET, *SAMPLED]],
    ids=["mixed", "RetinaNet, sampled"],
)
def test_resumes_bit_for_bit(tiny_config, tmp_path, opts):
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


def test_the_mean_is_of_weights_and_not_of_alpha(tiny_config, tmp_path):
    searches = []
    for share in (0.0, 0.5):
        options = ["SOLVER.AVERAGE_LAST", share]
        searches.append(make_trainer(tiny_config, tmp_path / f"{share}", *options))
        searches[-1].train()  # before the next one seeds all random states
    (weights, alphas, *_), (means, same, *_) = map(snapshot, searches)
    assert_equal(alphas, same, "alpha")
    key = "backbone.bottom_up.res5.0.conv2.weight"
    assert not torch.equal(weights[key], means[key])


# -- the rehearsal of the α step ------------------------------------------------------------------


@pytest.mark.parametrize(
    "opts",
    [["DATALOADER.NUM_WORKERS", 2, "SOLVER.AMP.ENABLED", True], [*RETINANET, *SAMPLED]],
    ids=["loader processes, float16", "RetinaNet, sampled"],
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


def test_a_rehearsal_leaves_no_gradients(trainer):
    trainer.rehearse_alpha_step()
    assert all(p.grad is None for p in trainer.model.parameters())
    assert not any(conv.alpha.requires_grad for conv in trainer.searched.values())


@pytest.mark.parametrize("start", [0, 1, 2])
def test_the_rehearsal_comes_before_the_first_alpha_step_only(tiny_config, tmp_path, start):
    trainer = make_trainer(tiny_config, tmp_path, "SOLVER.MAX_ITER", 5)  # the first is the third
    seen = []
    trainer.rehearse_alpha_step = lambda: seen.append(trainer.start_iter)
    trainer.start_iter = start
    trainer.train()
    assert seen == [start] * (start < 2)


def test_an_error_in_the_alpha_step_shows_at_the_start(trainer):
    def forward(batch):
        raise RuntimeError("out of memory")

    trainer.objectives["alpha"].losses = forward
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert not trainer.objectives["weight"].optimizer.state


# -- random numbers of the GPU --------------------------------------------------------------------


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


def break_losses(model, monkeypatch, how):
    """From now on a loss is NaN, its gradient is, or Detectron2's own check finds it."""
    plain = model.forward

    def forward(batch):
        losses = plain(batch)
        if how == "raise":
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
        if how == "gradient":
            losses["loss_cls"].register_hook(lambda gradient: gradient * math.inf)
        else:
            losses["loss_cls"] = losses["loss_cls"] * math.nan
        return losses

    monkeypatch.setattr(model, "forward", forward)


@pytest.mark.parametrize("how", ["value", "gradient", "raise"])
@pytest.mark.parametrize("step", ["weight", "alpha"])
def test_a_number_that_is_not_finite_ends_the_run_before_it_does_harm(
    tiny_config, tmp_path, monkeypatch, how, step
):
    trainer = make_trainer(tiny_config, tmp_path / "run")
    trainer.rehearse_alpha_step = lambda: None
    take_step = trainer.take_step

    def take(name):
        if (name, trainer.iter) == (step, 3):
            break_losses(trainer.model, monkeypatch, how)
        take_step(name)

    trainer.take_step = take
    words = f"iteration 3: the loss or gradient of the {step} step is not finite, "
    words += "Predicted boxes" if how == "raise" else "losses {'loss_cls': "
    with pytest.raises(NATSError, match=words) as caught:
        trainer.train()
    assert f"{tmp_path}/run/model_0000001.pth" in str(caught.value)
    assert "\n" not in str(caught.value)
    weights, alphas, *_ = snapshot(trainer)
    assert all(v.isfinite().all() for v in (*weights.values(), *alphas.values()))


def test_steps_that_look_for_float16s_loss_scale_are_no_fault(tiny_config, tmp_path):
    trainer = make_trainer(tiny_config, tmp_path / "run", "SOLVER.AMP.ENABLED", True)
    bias = trainer.model.roi_heads.box_predictor.cls_score.bias
    handle = bias.register_hook(lambda gradient: gradient * math.inf)
    before, scaler = snapshot(trainer), trainer.objectives["weight"].scaler
    scale = scaler.get_scale()
    steps(trainer, 0, 1)
    parameters = [name for name, _ in trainer.model.named_parameters() if "alpha" not in name]
    after = snapshot(trainer)[0]
    assert all(torch.equal(before[0][name], after[name]) for name in parameters)
    assert scaler.get_scale() == scale / 2
    scaler.load_state_dict({**scaler.state_dict(), "scale": 4.0})
    steps(trainer, 0, 2)
    with pytest.raises(NATSError, match="is not finite"):
        steps(trainer, 0, 1)  # no scale makes it finite
    handle.remove()


@pytest.mark.parametrize("how", ["to the end", "to an error"])
def test_training_leaves_no_loader_processes(tiny_config, tmp_path, monkeypatch, how):
    """Python's garbage collector would cut their queues, then wait 10 s for each."""
    before = set(multiprocessing.active_children())
    opts = ["DATALOADER.NUM_WORKERS", 2, "SOLVER.MAX_ITER", 4]
    trainer = make_trainer(tiny_config, tmp_path / "run", *opts)
    if how == "to an error":
        trainer.rehearse_alpha_step()
        trainer.rehearse_alpha_step = lambda: break_losses(trainer.model, monkeypatch, "value")
        with pytest.raises(NATSError, match="is not finite"):
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
    steps(trainer, 2, 8)  # float16 looks for its loss scale first
    after = snapshot(trainer)
    assert set(seen) == {getattr(torch, precision)}
    assert trainer.objectives["weight"].scaler.is_enabled() == (precision == "float16")
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
    # 0 means as many images as for a weight step: 1 is not scaled to it
    for images in (0, 1):
        opts = ["SOLVER.REFERENCE_WORLD_SIZE", 2, "SEARCH.ALPHA_IMS_PER_BATCH", images]
        scaled = scaled_to_processes(load_config(tiny_config, opts), 1)
        assert scaled.SEARCH.ALPHA_IMS_PER_BATCH == images


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "opts, words",
    [
        (["DATASETS.CALIBRATION", "('nats_embedded_train',)"], "share .* images"),
        (["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"], "nothing to search"),
        (["DATALOADER.SAMPLER_TRAIN", "Magic"], "SAMPLER_TRAIN 'Magic'"),
        (["SEARCH.RETRAIN_CONFIG", "nowhere.yaml"], "SEARCH.RETRAIN_CONFIG: config nowhere.yaml"),
        (["SEARCH.RETRAIN_CONFIG", "configs/quickstart/base.yaml"], "not fit res3.0.conv2"),
        (["SEARCH.DECODE_MARGIN", 1.5], "DECODE_MARGIN 1.5: expected a share"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[[28], [45]]"], "cannot be built: AssertionError"),
        (["MODEL.LOAD_PROPOSALS", True], "proposals of DATASETS.CALIBRATION cannot be named"),
        (["TEST.PRECISE_BN.ENABLED", True], "PRECISE_BN.ENABLED True: expected False"),
        (["DATASETS.CALIBRATION", "()"], "DATASETS.CALIBRATION is empty"),
    ],
)
def test_bad_input_is_named_before_training(tiny_config, tmp_path, opts, words):
    with pytest.raises(NATSError, match=words):
        make_trainer(tiny_config, tmp_path / "run", *opts)


@pytest.mark.parametrize("kind", ["search", "train"])
def test_is_resumed_with_its_own_settings_only(tiny_config, tmp_path, kind):
    plain = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"] if kind == "train" else []
    make_trainer(tiny_config, tmp_path / "run", *plain, kind=kind).save_checkpoint("model_0000001")
    for key, old, new in (
        ("SOLVER.BASE_LR", 0.01, 0.1),
        ("MODEL.RESNETS.NORM", "'BN'", "FrozenBN"),
        ("SOLVER.MAX_ITER", 6, 1),
    ):
        with pytest.raises(NATSError, match=f"run with other settings: {key}: {old}, now .?{new}"):
            make_trainer(tiny_config, tmp_path / "run", *plain, key, new, kind=kind)
    # what does not change the result may change
    free = ["DATALOADER.NUM_WORKERS", 1, "SOLVER.CHECKPOINT_PERIOD", 3]
    again = make_trainer(tiny_config, tmp_path / "run", *plain, *free, kind=kind)
    assert again.start_iter == 1


def test_is_resumed_by_as_many_processes_only(trainer, tmp_path):
    trainer.save_checkpoint("model_0000001")
    path = tmp_path / "run/model_0000001.pth"
    content = torch.load(path, weights_only=True)
    content["computed_by"] *= 2
    torch.save(content, path)
    with pytest.raises(
        NATSError, match="model_0000001.pth was written by 2 processes .* resumed by 1: start 2"
    ):
        trainer.resume_or_load()


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
    for conv in searched_layers(search.detector).values():
        conv.alpha.data.normal_()
    one = Architecture.decode(search.detector, "voted", at_most=1)
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
