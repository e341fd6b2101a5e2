"""Runs a script of this project with faults that come from inside.

    FAULTS='{"nan": [[3, 0]], "full_disk": 2}' python tests/faults/faulty.py search_net.py ...

nan: [iteration, forward pass in it] whose losses become NaN (0: weights, 1: α).
full_disk: the checkpoint, counted from 0 in this process, whose writing stops half way.
"""

import errno
import io
import json
import math
import os
import runpy
import sys

import torch

from detectron2.modeling import GeneralizedRCNN
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


if __name__ == "__main__":
    faults = json.loads(os.environ["FAULTS"])
    put_nan(faults.get("nan", []))
    fill_disk(faults.get("full_disk", -1))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
