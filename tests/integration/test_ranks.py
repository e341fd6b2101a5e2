"""Two gloo processes of one search: that they agree, and what they do when one goes wrong."""

import math
import subprocess
import sys

import pytest
import torch
from ranks import on_two_ranks
from runs import assert_equal, make_trainer
from torch.nn.parallel import DistributedDataParallel

from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from detectron2_nats import NATSError
from detectron2_nats.engine.steps import LossModule, mean_over_ranks
from detectron2_nats.search.alpha_log import check_ranks_agree

LAYER = "res4.1.conv2"


def agreement(config, folder):
    trainer = make_trainer(config, folder)
    check_ranks_agree(trainer.searched)
    alpha = trainer.searched[LAYER].alpha.detach()
    messages = []
    for value in (1e-30, math.nan):
        if comm.get_rank() == 1:
            alpha[1, 1] = value
        try:
            check_ranks_agree(trainer.searched)
        except NATSError as error:
            messages.append(str(error))
    return messages


def test_a_difference_is_named_on_both_ranks(tiny_config, tmp_path):
    first, second = on_two_ranks(agreement, tiny_config, str(tmp_path))
    assert first == second and len(first) == 2
    for message in first:
        assert message.startswith(f"α differs between the ranks in {LAYER}. Resume")


def a_few_steps(config, folder, *opts):
    """The end of three iterations, with gradients as views and as copies."""
    ends = []
    for views in (True, False):
        trainer = make_trainer(config, folder, *opts)
        wrapper = trainer.weight_objective.losses
        assert wrapper.gradient_as_bucket_view
        if not views:
            wrapper = DistributedDataParallel(wrapper.module, broadcast_buffers=False)
            trainer.weight_objective.losses = wrapper
        torch.manual_seed(comm.get_rank())
        with EventStorage(1) as trainer.storage:
            for trainer.iter in range(1, 4):  # α steps among them
                trainer.run_step()
        check_ranks_agree(trainer.searched)
        state = [
            trainer.weight_objective.optimizer.state_dict(),
            trainer.alpha_objective.optimizer.state_dict(),
        ]
        ends.append({"model": trainer.model.state_dict(), "optimizers": state})
    assert_equal(*ends, "end")
    return True


@pytest.mark.parametrize("sample", [False, True])  # sampled, the ranks draw different networks
def test_gradients_as_views_give_the_same_bits(tiny_config, tmp_path, sample):
    opts = ["MODEL.NATS.SAMPLE", sample]
    assert on_two_ranks(a_few_steps, tiny_config, str(tmp_path), *opts) == [True, True]


def rehearsal(config, folder):
    trainer = make_trainer(config, folder)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    sizes, all_reduce = [], torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda tensor: sizes.append(tensor.numel()) or all_reduce(tensor)
    trainer.rehearse_alpha_step()
    torch.distributed.all_reduce = all_reduce
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return sizes, sum(conv.alpha.numel() for conv in trainer.searched.values())


def test_a_rehearsed_alpha_step_reduces_its_gradient_too(tiny_config, tmp_path):
    first, second = on_two_ranks(rehearsal, tiny_config, str(tmp_path))
    assert first == second and first[0] == [first[1]]


def two_thirds(config, folder, *opts):
    trainer = make_trainer(config, folder, *opts)
    step = trainer.run_step
    trainer.run_step = lambda: 1 / 0 if trainer.iter == 4 else step()  # dies there
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    return [value.sum().item() for value in trainer.model.state_dict().values()]


@pytest.mark.parametrize("reference, start, max_iter", [(0, 4, 6), (2, 8, 12)])
def test_one_process_goes_on_where_two_were(tiny_config, tmp_path, reference, start, max_iter):
    """With the same batch, or with as many images for each process."""
    opts = ["SOLVER.REFERENCE_WORLD_SIZE", reference]
    on_two_ranks(two_thirds, tiny_config, str(tmp_path), *opts)
    trainer = make_trainer(tiny_config, tmp_path, *opts)
    assert (trainer.start_iter, trainer.max_iter) == (start, max_iter)
    assert trainer.alpha_start == 0.34 * max_iter // 1 and trainer.alpha_objective.optimizer.state
    trainer.train()
    assert (tmp_path / "retrain.yaml").exists()


def nan_on_one_rank(config, folder, how, good, bad_rank):
    trainer = make_trainer(config, folder)
    plain = trainer.model.forward

    def forward(batch):
        losses = plain(batch)
        if comm.get_rank() == bad_rank and trainer.iter == 3:
            if how == "raise":
                raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
            losses["loss_cls"] = losses["loss_cls"] * math.nan
        return losses

    trainer.model.forward = forward

    def state():
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}

    states = [state()]
    with EventStorage(0) as trainer.storage:
        for trainer.iter in range(3 - good, 5):
            trainer.run_step()
            states.append(state())
    counts = [
        (objective.bad_total, objective.bad_in_row) for objective in trainer.objectives().values()
    ]
    skipped = all(torch.equal(states[-3][name], states[-2][name]) for name in states[0])
    went_on = not torch.equal(
        states[-2]["backbone.bottom_up.res5.0.conv2.weight"],
        states[-1]["backbone.bottom_up.res5.0.conv2.weight"],
    )
    trained = [name for name, _ in trainer.model.named_parameters()]
    checksums = [states[-1][name].double().sum().item() for name in trained]
    return counts, skipped, went_on, checksums


@pytest.mark.parametrize("how, good, rank", [("value", 3, 1), ("raise", 3, 1), ("raise", 0, 0)])
def test_nan_on_one_rank_is_skipped_by_both(tiny_config, tmp_path, how, good, rank):
    """Also in the first step after a start or a resume."""
    first, second = on_two_ranks(nan_on_one_rank, tiny_config, str(tmp_path), how, good, rank)
    assert first == second
    counts, skipped, went_on, checksums = first
    assert counts == [(1, 0), (1, 0)] and skipped and went_on
    assert all(map(math.isfinite, checksums))


def steps_with_sync_bn(config, folder):
    norms = ["MODEL.RESNETS.NORM", "SyncBN", "MODEL.FPN.NORM", "SyncBN"]
    trainer = make_trainer(config, folder, *norms)
    assert trainer.cfg.MODEL.RESNETS.NORM == "SyncBN"  # what an export and a resume go by
    with EventStorage(0) as trainer.storage:
        for trainer.iter in range(3):
            trainer.run_step()
    assert trainer.weight_objective.bad_total == trainer.alpha_objective.bad_total == 0
    return {name: value.double().sum().item() for name, value in trainer.model.state_dict().items()}


def test_sync_bn_works_on_cpu_processes(tiny_config, tmp_path):
    """Statistics over both: without, each would hold those of its own images."""
    first, second = on_two_ranks(steps_with_sync_bn, tiny_config, str(tmp_path))
    assert first == second and "backbone.bottom_up.res5.2.conv3.norm.running_var" in first


class SyncedMean(torch.autograd.Function):
    """As a SyncBN: the ranks talk to each other in the middle of forward and of backward."""

    @staticmethod
    def forward(ctx, x):
        mean = x.mean(0)
        torch.distributed.all_reduce(mean)
        return x - mean / comm.get_world_size()

    @staticmethod
    def backward(ctx, gradient):
        mean = gradient.mean(0)
        torch.distributed.all_reduce(mean)
        return gradient - mean / comm.get_world_size()


class SyncedDetector(torch.nn.Module):
    """A backbone with such a norm; a head that raises on one rank, as Detectron2's RPN would."""

    def __init__(self, bad_rank):
        super().__init__()
        self.backbone = Features()
        self.head = torch.nn.Linear(7, 2)
        self.bad_rank = bad_rank

    def forward(self, data):
        features = self.backbone(data)["p2"]
        if comm.get_rank() == self.bad_rank:
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
        first, second = self.head(features).square().mean(0)
        return {"first": first, "second": second}


class Features(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.after = torch.nn.Linear(3, 5), torch.nn.Linear(5, 7)

    def forward(self, x):
        return {"p2": self.after(SyncedMean.apply(self.before(x)))}


def raise_with_sync_bn(bad_rank):
    torch.manual_seed(0)
    detector = SyncedDetector(bad_rank)
    # small buckets: several all-reduces, among those of the norm
    losses = DistributedDataParallel(LossModule(detector), bucket_cap_mb=1e-5)
    reports = []
    for detector.bad_rank in (bad_rank, None):
        found = losses(torch.randn(4, 3))
        detector.zero_grad()
        sum(found.values()).backward()
        gradients = [value for p in detector.parameters() for value in p.grad.flatten().tolist()]
        reports.append((mean_over_ranks(found)[0], gradients))
    return reports


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_raise_on_one_rank_passes_through_sync_bn(bad_rank):
    both = on_two_ranks(raise_with_sync_bn, bad_rank)
    for (bad, bad_gradients), (good, _) in both:
        assert set(bad) == {"loss", "first", "second"}  # on each rank what any rank has
        assert all(map(math.isnan, [*bad.values(), *bad_gradients]))
        assert all(map(math.isfinite, good.values()))
    (_, first), (_, second) = (reports[1] for reports in both)
    assert first == second and all(map(math.isfinite, first))


DONE = """
import atexit, builtins, os, sys
import torch.distributed as dist
from detectron2_nats.engine import processes

class Torn:
    def __del__(self, write=os.write):
        write(1, b"torn down")

builtins.torn = Torn()  # goes with the interpreter
atexit.register(lambda: print("at exit", dist.is_initialized()))
atexit.register(lambda: 1 / 0)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
processes._call(print, "all", "done")
"""


def test_leaves_the_group_when_done_and_tears_nothing_down():
    """A thread of the group that let go of a tensor meanwhile would abort the process."""
    process = subprocess.run([sys.executable, "-c", DONE], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, "all done\nat exit True\n")
    assert "ZeroDivisionError" in process.stderr


def test_a_loss_that_one_rank_lacks_is_nan_on_all(monkeypatch):
    other = {"cls": 3.0, "mask": 1.0}
    monkeypatch.setattr(comm, "all_gather", lambda message: [message, (False, other)])
    means, _ = mean_over_ranks({"cls": torch.tensor(1.0)})
    assert means["cls"] == 2.0 and math.isnan(means["mask"])
