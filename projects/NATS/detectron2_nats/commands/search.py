"""Search which dilation each channel group of a detector's backbone should use."""

import argparse
from typing import Optional

from detectron2.config import CfgNode

from ..data.registry import check_datasets
from ..errors import NATSError
from ..search.trainer import SearchTrainer
from .train import run_script, setup, train_or_evaluate

EPILOG = """
examples:
  search on the embedded data set, on one CPU or GPU:
    $ %(prog)s --config-file configs/quickstart/search.yaml
  the paper's search, eight GPUs of one machine:
    $ %(prog)s --num-gpus 8 --config-file configs/search/faster_rcnn_R_50_FPN.yaml
  resume after a kill:
    $ %(prog)s --num-gpus 8 --config-file ... --resume
  the same with torchrun:
    $ torchrun --nproc-per-node 8 -m detectron2_nats.commands.search --config-file ...
  change settings:
    $ %(prog)s --config-file ... MODEL.NATS.NUM_GROUPS 8 SEARCH.ALPHA_LR 0.02

The search writes checkpoints, architecture.yaml (the result) and retrain.yaml (a plain config for
train_net.py) to OUTPUT_DIR. With MODEL.DEVICE cpu, --num-gpus 2 starts two processes on the CPU.
exit status: 0 done, 2 bad input, 75 stopped on request (continue with --resume), 1 failed.
"""


def main(cfg: CfgNode, args: argparse.Namespace) -> None:
    setup(cfg, args)
    if not args.eval_only:
        if not cfg.DATASETS.CALIBRATION:
            raise NATSError("DATASETS.CALIBRATION is empty: set it to the data set that trains α")
        check_datasets(cfg.DATASETS.CALIBRATION, "DATASETS.CALIBRATION")
    train_or_evaluate(SearchTrainer, cfg, args)


def run(prog: Optional[str] = None) -> None:
    """The command; `prog` is its name in the help."""
    run_script(main, __doc__, EPILOG, prog)


if __name__ == "__main__":  # for torchrun
    run()
