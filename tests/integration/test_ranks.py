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
from detectron2_nats.search.hooks import check_ranks_agree

LAYER = "res4.1.conv2"


def disagreement(config, folder, towards):
    """What a run says in which an α of the second rank becomes the next number, or NaN."""
    trainer = make_trainer(config, folder)
    step = trainer.run_step

    def run_step():
        step()
        if comm.get_rank() == 1 and trainer.iter == 3:
            alpha = trainer.searched[LAYER].alpha.data
            alpha[1, 1] = torch.nextafter(alpha[1, 1], torch.tensor(towards))

    trainer.run_step = run_step
    with pytest.raises(NATSError) as error:
        trainer.train()
    return str(error.value), trainer.iter


@pytest.mark.parametrize("towards", [math.inf, math.nan])
def test_ranks_that_disagree_on_alpha_end_the_run_on_both(tiny_config, tmp_path, towards):
    first, second = on_two_ranks(disagreement, tiny_config, str(tmp_path), towards)
    assert first == second
    message, iteration = first
    assert message.startswith(f"α differs between the ranks in {LAYER}. Resume") and iteration == 3


def a_few_steps(config, folder, *opts):
    """The end of three iterations, with gradients as views and as copies."""
    ends = []
    for views in (True, False):
        trainer = make_trainer(config, folder, *opts)
        wrapper = trainer.objectives["weight"].losses
        assert wrapper.gradient_as_bucket_view
        if not views:
            wrapper = DistributedDataParallel(wrapper.module, broadcast_buffers=False)
            trainer.objectives["weight"].losses = wrapper
        torch.manual_seed(comm.get_rank())
        with EventStorage(1) as trainer.storage:
            for trainer.iter in range(1, 4):  # α steps among them
                trainer.run_step()
        check_ranks_agree(trainer.searched)
        state = [
            trainer.objectives["weight"].optimizer.state_dict(),
            trainer.objectives["alpha"].optimizer.state_dict(),
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


def steps_with_sync_bn(config, folder):
    norms = ["MODEL.RESNETS.NORM", "SyncBN", "MODEL.FPN.NORM", "SyncBN"]
    trainer = make_trainer(config, folder, *norms)
    assert trainer.cfg.MODEL.RESNETS.NORM == "SyncBN"  # what an export and a resume go by
    with EventStorage(0) as trainer.storage:
        for trainer.iter in range(3):
            trainer.run_step()
    return {name: value.double().sum().item() for name, value in trainer.model.state_dict().items()}


def test_sync_bn_works_on_cpu_processes(tiny_config, tmp_path):
    """Statistics over both: without, each would hold those of its own images."""
    first, second = on_two_ranks(steps_with_sync_bn, tiny_config, str(tmp_path))
    assert first == second and "backbone.bottom_up.res5.2.conv3.norm.running_var" in first


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
processes._call_in_group(print, "all", "done")
"""


def test_leaves_the_group_when_done_and_tears_nothing_down():
    """A thread of the group that let go of a tensor meanwhile would abort the process."""
    process = subprocess.run([sys.executable, "-c", DONE], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, "all done\nat exit True\n")
    assert "ZeroDivisionError" in process.stderr
