"""Train or evaluate a detector: a plain one, or one with a searched backbone."""

import argparse
import contextlib
import logging
import os
from typing import Iterator, Type

import nats_commands
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.modeling import build_model
from detectron2.utils import comm

from ..config import load_config
from ..config.keys import check_config
from ..data.registry import check_data, check_registered_classes, register_datasets
from ..engine.checkpoint import SafeCheckpointer
from ..engine.lock import lock_folder
from ..engine.machine import set_usable_device
from ..engine.processes import run_in_processes
from ..engine.resumable import ResumableTrainer
from ..engine.weights import check_same_dilations
from ..errors import NATSError
from ..files import read_bounded, write_atomically


def setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Lock OUTPUT_DIR, start the log, choose the device; freezes `cfg`. The trainer checks it."""
    if comm.is_main_process() and not args.eval_only:
        lock_folder(cfg.OUTPUT_DIR)
    if args.config_file and not os.path.isfile(args.config_file):
        args.config_file = ""  # a zoo name: default_setup would open it as a file
    with _unchanged(_config_path(cfg)):  # default_setup overwrites it
        default_setup(cfg, args)
    logging.getLogger("detectron2_nats").parent = logging.getLogger("detectron2")
    set_usable_device(cfg)
    cfg.freeze()


def _config_path(cfg: CfgNode) -> str:
    """config.yaml: how the checkpoints in the folder were made. Exports and scores rely on it."""
    return os.path.join(cfg.OUTPUT_DIR, "config.yaml")


@contextlib.contextmanager
def _unchanged(path: str) -> Iterator[None]:
    """In the main process: if the file is there, write it again as it was."""
    earlier = read_bounded(path) if comm.is_main_process() and os.path.isfile(path) else None
    yield
    if earlier is not None:
        write_atomically(path, lambda file: file.write(earlier))


def train_or_evaluate(
    trainer_class: Type[ResumableTrainer], cfg: CfgNode, args: argparse.Namespace
):
    """Do what the command line asks for: evaluate, start training, or resume it."""
    if args.eval_only:
        check_config(cfg)
        if not cfg.DATASETS.TEST:
            raise NATSError("DATASETS.TEST is empty: name the data set to evaluate on")
        register_datasets(cfg)
        model = build_model(cfg)
        checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR)
        loaded = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        checkpointer.check_complete()
        check_same_dilations(cfg, loaded, checkpointer.loaded_from)
        check_data(cfg, ["TEST"], loaded.get("classes") or None)
        check_registered_classes(cfg)
        return trainer_class.test(cfg, model)
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=args.resume)
    if comm.is_main_process():  # not before: an earlier run in the folder may not be continued so
        write_atomically(_config_path(cfg), cfg.dump())
    return trainer.train()


def train(cfg: CfgNode, args: argparse.Namespace) -> None:
    """In each process: train, resume or evaluate."""
    if cfg.MODEL.BACKBONE.NAME == "build_nats_backbone" and not cfg.MODEL.NATS.ARCHITECTURE:
        raise NATSError(
            f"{args.config_file or 'the config'} describes a search, whose α would be trained like "
            "a weight: start it with search_net.py, or train the retrain.yaml that it writes"
        )
    setup(cfg, args)
    train_or_evaluate(ResumableTrainer, cfg, args)


def main(args: argparse.Namespace) -> None:
    run_in_processes(train, load_config(args.config_file, args.opts), args)


def run() -> None:
    """The command, with its words in `sys.argv`."""
    nats_commands.main("train")
