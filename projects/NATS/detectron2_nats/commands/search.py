"""Search which dilation each channel group of a detector's backbone should use."""

import argparse

from detectron2.config import CfgNode

from ..config import load_config
from ..engine.processes import run_in_processes
from ..search.trainer import SearchTrainer
from .train import setup, train_or_evaluate


def search(cfg: CfgNode, args: argparse.Namespace) -> None:
    """In each process: search, resume or evaluate."""
    setup(cfg, args)
    train_or_evaluate(SearchTrainer, cfg, args)


def main(args: argparse.Namespace) -> None:
    run_in_processes(search, load_config(args.config_file, args.opts), args)
