"""Search which dilation each channel group of a detector's backbone should use."""

import argparse
import logging
import shlex
import time
from typing import Optional

from tabulate import tabulate

import nats_commands
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from ..config import load_config
from ..data.registry import check_datasets
from ..engine.determinism import preserved_random_states
from ..engine.loader import dataset_dicts
from ..engine.processes import run_in_processes
from ..errors import NATSError, one_line
from ..search.folder import SearchFolder
from ..search.score import candidates, field_verdict, one_shot_score, scoring_batches, some_of
from ..search.trainer import SearchTrainer
from ..show.history import read_history
from .train import setup, train_or_evaluate

logger = logging.getLogger(__name__)

_DRAWS = 6
"""Random architectures that a search's end scores. In the measured cases the verdict on six was
that on all that were drawn: docs/results/scores.md."""

_FROZEN_IMAGES = 64
"""At most so many are scored in the middle of a run, where the other processes wait for it."""


class _ReportingTrainer(SearchTrainer):
    """Also draws the architecture and α's history for TensorBoard, at each checkpoint.

    At the search's end it says what the score says of architectures that need no search.
    """

    def train(self):
        results = super().train()
        if self.frozen_at is None and comm.is_main_process():
            said = self._scores()
            score = "nats-score " + shlex.quote(self.cfg.OUTPUT_DIR)
            if said:
                logger.info(f"{said} More images and draws:\n  {score}")
            else:
                logger.info(f"Whether a wider field pays at all, without training:\n  {score}")
        return results

    def freeze(self) -> None:
        if comm.is_main_process():  # the last moment at which the weights suit all dilations
            with preserved_random_states():
                said = self._scores(_FROZEN_IMAGES)
            if said:
                logger.info(said)
        super().freeze()

    def _scores(self, most: Optional[int] = None) -> str:
        """What the score says, on at most so many images; nothing if unwanted, or if it fails."""
        count = self.cfg.SEARCH.SCORE_IMAGES
        try:
            return self._scored(min(count, most or count)) if count else ""
        except Exception as error:  # the run goes on, or its result has been written
            logger.warning(f"no score of what was found: {one_line(error)}")
            return ""

    def _scored(self, count: int) -> str:
        """What a few calibration images say of the architectures that need no search."""
        start = time.perf_counter()
        records = dataset_dicts(self.cfg, self.cfg.DATASETS.CALIBRATION)
        records = some_of(records, count)
        with preserved_random_states():
            batches = scoring_batches(self.cfg, records, comm.get_world_size())
        architectures = candidates(self.cfg, self.model, _DRAWS)
        scores = {
            name: one_shot_score(self.model, architecture, batches)
            for name, architecture in architectures.items()
        }
        table = tabulate(sorted(scores.items(), key=lambda s: s[1]), ["", "loss"], floatfmt=".4f")
        took = time.perf_counter() - start
        return (
            f"Losses on {len(records)} calibration images, with the super-network's own weights, "
            f"which suit what was found ({took:.0f} s):\n{table}\n{field_verdict(scores)}"
        )

    def after_checkpoint(self) -> None:
        super().after_checkpoint()
        if comm.is_main_process():
            try:
                self._draw()
            except Exception as error:  # a picture must not end a search
                logger.warning(f"no pictures for TensorBoard: {error}")

    def _draw(self) -> None:
        from ..show import pictures  # matplotlib is slow to import

        done = f"after iteration {self.iter + 1} of {self.max_iter}"
        figures = {"architecture": pictures.plot_architecture(self.architecture(), done)}
        folder = SearchFolder(self.cfg.OUTPUT_DIR)
        if folder.has("metrics.json"):  # empty before the first line
            history = read_history(folder.file("metrics.json"))
            figures["history"] = pictures.plot_history(history, done)
        for name, figure in figures.items():
            get_event_storage().put_image(f"alpha/{name}", pictures.as_image(figure))


def search(cfg: CfgNode, args: argparse.Namespace) -> None:
    """In each process: search, resume or evaluate."""
    setup(cfg, args)
    if not args.eval_only:
        if not cfg.DATASETS.CALIBRATION:
            raise NATSError("DATASETS.CALIBRATION is empty: set it to the data set that trains α")
        check_datasets(cfg.DATASETS.CALIBRATION, "DATASETS.CALIBRATION")
    train_or_evaluate(_ReportingTrainer, cfg, args)


def main(args: argparse.Namespace) -> None:
    run_in_processes(search, load_config(args.config_file, args.opts), args)


def run() -> None:
    """The command, with its words in `sys.argv`."""
    nats_commands.main("search")
