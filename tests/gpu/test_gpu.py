"""On a GPU: what the CPU computes, by one process and by two. Skipped where there is none."""

import copy
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import on_two_ranks
from runs import TINY, assert_equal, finish, make_trainer, printed, script, wait_until

from detectron2.layers import Conv2d
from detectron2.utils.events import EventStorage
from detectron2_nats import GroupedDilationConv2d, MixedDilationConv2d
from detectron2_nats.toy.sets import ensure_embedded_dataset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no usable CUDA")

DEVICE = "cuda"
ON_GPU = ("MODEL.DEVICE", DEVICE)
GENOTYPES = ((1, 1), (1, 3), (3, 1), (2, 2))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    ensure_embedded_dataset()
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


def conv_of(kind: str, groups: int):
    torch.manual_seed(0)
    plain = Conv2d(32, 64, 3, padding=1, groups=groups, bias=True)
    if kind == "frozen":
        return GroupedDilationConv2d(plain, [(16, 1, 1), (16, 1, 3), (16, 1, 1), (16, 2, 2)])
    conv = MixedDilationConv2d(plain, genotypes=GENOTYPES, num_groups=4)
    conv.alpha.data.normal_()
    conv.replicas.data.normal_(std=0.1)
    conv.alpha.requires_grad_(kind == "alpha step")
    for parameter in (conv.weight, conv.bias, conv.replicas):
        parameter.requires_grad_(kind == "weight step")
    return conv


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", ["frozen", "weight step", "alpha step"])
def test_convs_compute_what_they_do_on_the_cpu(kind, groups):
    results = []
    for device in ("cpu", DEVICE):
        conv = copy.deepcopy(conv_of(kind, groups)).to(device)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 32, 21, 30, generator=generator).to(device).requires_grad_()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            y = conv(x)
            y.square().sum().backward()
        gradients = {name: p.grad for name, p in conv.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "x": x.grad, **gradients})
    on_cpu, on_gpu = results
    assert on_cpu.keys() == on_gpu.keys() and len(on_cpu) > 2
    for name, expected in on_cpu.items():
        torch.testing.assert_close(
            on_gpu[name].cpu(), expected, rtol=1e-3, atol=1e-3, msg=lambda m: f"{name}: {m}"
        )


def take_steps(trainer, count=4):
    with EventStorage(0) as trainer.storage:
        for trainer.iter in range(count):
            trainer.run_step()
    return [conv.alpha.detach().clone() for conv in trainer.searched.values()]


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_mixed_precision_takes_both_steps(config, tmp_path, precision):
    amp = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", precision)
    trainer = make_trainer(config, tmp_path, *ON_GPU, *amp, "SEARCH.ALPHA_START", 0.0)
    alphas = take_steps(trainer, 12)  # float16's scale may have to be found first
    assert all(alpha.isfinite().all() for alpha in alphas)
    assert any(alpha.any() for alpha in alphas)


def test_a_resume_restores_the_exact_state(config, tmp_path):
    trainer = make_trainer(config, tmp_path, *ON_GPU, "SOLVER.MAX_ITER", 4)
    trainer.train()
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    again = make_trainer(config, tmp_path, *ON_GPU, "SOLVER.MAX_ITER", 4)
    assert again.start_iter == 4
    with EventStorage(3):
        again.save_checkpoint("again")
    resaved = torch.load(tmp_path / "again.pth", weights_only=True)
    assert next(again.model.parameters()).device.type == DEVICE
    for part in ("model", "run", "iteration", "computed_by"):
        assert_equal(saved[part], resaved[part], part)


def backend() -> str:
    """NCCL refuses two ranks on one card; gloo moves a GPU's tensors too."""
    return "nccl" if torch.cuda.device_count() > 1 else "gloo"


def steps_of_a_rank(config, folder, *opts):
    trainer = make_trainer(config, folder, *ON_GPU, *opts)
    alphas = take_steps(trainer)
    state = trainer.model.state_dict()
    statistics = sum(v.double().sum().item() for k, v in state.items() if "running" in k)
    moved = any(alpha.any().item() for alpha in alphas)
    return moved, [alpha.double().sum().item() for alpha in alphas], statistics


def test_two_ranks_hold_the_same_alpha(config, tmp_path):
    first, second = on_two_ranks(steps_of_a_rank, config, str(tmp_path), backend=backend())
    assert first[0] and first[1] == second[1]
    assert first[2] != second[2]  # BN: each has statistics of its own images


def test_sync_bn_on_two_ranks(config, tmp_path):
    norms = ("MODEL.RESNETS.NORM", "SyncBN", "MODEL.FPN.NORM", "SyncBN")
    first, second = on_two_ranks(steps_of_a_rank, config, str(tmp_path), *norms, backend=backend())
    assert first == second and math.isfinite(first[2])


def test_ranks_die_with_their_launcher_and_leave_the_gpu(config, tmp_path):
    """By torchrun, which starts a group of one too."""
    ranks = min(2, torch.cuda.device_count() or 1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    arguments = ["--config-file", config, "--resume", *ON_GPU, "OUTPUT_DIR", str(tmp_path)]
    endless = ["SOLVER.MAX_ITER", "6", "RUN.KEEP_CHECKPOINTS", "100"]
    process = script("search_net.py", *arguments, *endless, launcher=launcher)
    wait_until(lambda: (tmp_path / "model_0000001.pth").exists(), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == ranks, printed(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{child}/fd/0") for child in children):  # no zombie has one
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "Search done" in finish(script("search_net.py", *arguments, launcher=launcher))
