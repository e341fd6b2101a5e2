"""Two gloo processes of one search: that they agree, and what they do when one goes wrong."""

import math
import socket
import traceback

import pytest
import torch
import torch.multiprocessing as mp
from tiny import make_trainer

from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from detectron2_nats import NATSError
from detectron2_nats.trainer import check_ranks_agree

LAYER = "res4.1.conv2"


def start_rank(rank, port, test, results, arguments):
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=rank
    )
    comm.create_local_process_group(2)
    try:
        results.put((rank, test(*arguments)))
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise
    # A process that exits as a member can be aborted by the group's threads.
    comm.synchronize()
    torch.distributed.destroy_process_group()


def on_two_ranks(test, *arguments):
    """What `test(*arguments)` returns on rank 0 and on rank 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(start_rank, (port, test, results, arguments), nprocs=2, join=False)
    while not context.join(timeout=120):
        pass
    return [value for _, value in sorted(results.get() for _ in range(2))]


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
        assert message.startswith(f"α differs between the ranks in {LAYER}: the run is stopped")


def nan_on_rank_1(config, folder, how, good):
    trainer = make_trainer(config, folder)
    plain = trainer.model.forward

    def forward(batch):
        losses = plain(batch)
        if comm.get_rank() == 1 and trainer.iter == 3:
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
    counts = [(phase.bad_total, phase.bad_in_row) for phase in trainer.phases()]
    skipped = all(torch.equal(states[-3][name], states[-2][name]) for name in states[0])
    went_on = not torch.equal(
        states[-2]["backbone.bottom_up.res5.0.conv2.weight"],
        states[-1]["backbone.bottom_up.res5.0.conv2.weight"],
    )
    trained = [name for name, _ in trainer.model.named_parameters()]
    checksums = [states[-1][name].double().sum().item() for name in trained]
    return counts, skipped, went_on, checksums


@pytest.mark.parametrize("how, good", [("value", 3), ("raise", 3), ("raise", 0)])
def test_nan_on_one_rank_is_skipped_by_both(tiny_config, tmp_path, how, good):
    """Also in the first step after a start or a resume."""
    first, second = on_two_ranks(nan_on_rank_1, tiny_config, str(tmp_path), how, good)
    assert first == second
    counts, skipped, went_on, checksums = first
    assert counts == [(1, 0), (1, 0)] and skipped and went_on
    assert all(map(math.isfinite, checksums))
