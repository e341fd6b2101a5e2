"""Runs a script of this project with faults that come from inside.

    FAULTS='{"nan": [[3, 0]], "full_disk": 2}' python tests/faults/faulty.py search_net.py ...

nan: [iteration, forward pass in it] whose losses become NaN (0: weights, 1: α).
full_disk: the checkpoint, counted from 0 in this process, whose writing stops half way.
diverged: [rank, iteration] whose first forward pass ends as Detectron2 ends it.
out_of_memory: [rank, iteration] whose first forward pass finds no memory.
"""

import errno
import io
import json
import math
import os
import sys
from pathlib import Path

import torch

from detectron2.modeling import GeneralizedRCNN
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage


def put_nan(passes) -> None:
    forward, count = GeneralizedRCNN.forward, {}

    def with_nan(self, batch):
        losses = forward(self, batch)
        if self.training:
            iteration = get_event_storage().iter
            number = count[iteration] = count.get(iteration, -1) + 1
            if [iteration, number] in passes:
                losses = {name: loss * math.nan for name, loss in losses.items()}
        return losses

    GeneralizedRCNN.forward = with_nan


def fill_disk(at: int) -> None:
    save, count = torch.save, iter(range(10**9))

    def half(obj, file, *args, **kwargs):
        if next(count) != at:
            return save(obj, file, *args, **kwargs)
        whole = io.BytesIO()
        save(obj, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    torch.save = half


def allocate() -> None:
    torch.empty(2**50)


def diverge() -> None:
    raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")


def fail(rank: int, iteration: int, how) -> None:
    forward = GeneralizedRCNN.forward

    def failing(self, batch):
        if self.training and (comm.get_rank(), get_event_storage().iter) == (rank, iteration):
            how()
        return forward(self, batch)

    GeneralizedRCNN.forward = failing


faults = json.loads(os.environ["FAULTS"])
put_nan(faults.get("nan", []))
fill_disk(faults.get("full_disk", -1))
fail(*faults.get("out_of_memory", [-1, -1]), allocate)
fail(*faults.get("diverged", [-1, -1]), diverge)
if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    os.environ["FAULTY_SCRIPT"] = sys.argv[0]
# Not by runpy: the ranks that the script starts import this file, and look for its main in it
script = os.environ["FAULTY_SCRIPT"]
exec(compile(Path(script).read_text(), script, "exec"))
