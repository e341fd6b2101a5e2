"""What a search does between its steps: log α, say what the score says, write the result."""

import logging
import shlex
from typing import Any, Dict, List

import torch
from torch import nn

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from ..engine.determinism import preserved_random_states
from ..errors import NATSError, one_line
from ..method.decidedness import all_votes
from ..method.decode import intensities
from .score import score_report

logger = logging.getLogger(__name__)


class AlphaHook(HookBase):
    """Logs the state of α while it is searched, and checks that α is equal on all ranks.

    Attributes:
        last_votes: layer → votes at the last line of the log.
        tenths: the same, at the ends of the last two full tenths of the search.
    """

    def __init__(self, log_period: int, check_period: int):
        self._log_period, self._check_period = log_period, check_period
        self.last_votes: Dict[str, List[int]] = {}
        self.tenths: List[Dict[str, List[int]]] = []

    def after_step(self):
        trainer, done = self.trainer, self.trainer.iter + 1
        if not trainer.is_searching:
            return
        if done > trainer.alpha_start and done % self._check_period == 0:
            check_ranks_agree(trainer.searched)
        if trainer.ends_a_tenth(done):
            self.tenths = [*self.tenths[-1:], all_votes(trainer.alphas())]
        if done == trainer.search_end or done % self._log_period == 0:
            self._log()

    def votes_before(self) -> Dict[str, List[int]]:
        """Layer → votes a tenth of the search ago; empty in its first tenths."""
        return self.tenths[0] if len(self.tenths) == 2 else {}

    def _log(self):
        storage, alphas = get_event_storage(), self.trainer.alphas()
        votes = all_votes(alphas)
        groups = [
            vote != before
            for name, own in votes.items()
            for vote, before in zip(own, self.last_votes.get(name, [0] * len(own)))
        ]
        changed, self.last_votes = sum(groups), votes
        overall: Dict[tuple, List[float]] = {}
        for name, conv in self.trainer.searched.items():
            for (d_h, d_w), share in zip(conv.genotypes, intensities(alphas[name])):
                storage.put_scalar(f"intensity/{name}/{d_h}x{d_w}", share, smoothing_hint=False)
                overall.setdefault((d_h, d_w), []).append(share)
        decidedness = self.trainer.decidedness()
        storage.put_scalar("alpha/entropy", decidedness.entropy, smoothing_hint=False)
        storage.put_scalar("alpha/leading", decidedness.leading, smoothing_hint=False)
        storage.put_scalar("alpha/votes_changed", changed, smoothing_hint=False)
        shares = ", ".join(f"{h}x{w} {sum(s) / len(alphas):.0%}" for (h, w), s in overall.items())
        logger.info(
            f"alpha: {decidedness}; {changed} of {len(groups)} votes changed since the last line; "
            f"intensity over all layers: {shares}"
        )

    def state_dict(self) -> Dict[str, Any]:
        return {"last_votes": self.last_votes, "tenths": self.tenths}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.last_votes, self.tenths = state["last_votes"], state["tenths"]


class ResultHook(HookBase):
    """Writes the result of a run that has come to its end."""

    def after_train(self):
        if self.trainer.iter >= self.trainer.max_iter and comm.is_main_process():
            self.trainer.write_result()


class ScoreHook(HookBase):
    """Says at the search's end what the score says of architectures that need no search."""

    def after_train(self):
        trainer = self.trainer
        if trainer.iter >= trainer.max_iter and trainer.is_searching:
            self.report()
            if comm.is_main_process():
                show = f"nats-show {shlex.quote(trainer.cfg.OUTPUT_DIR)} --score 200"
                logger.info(f"Whether a wider field pays, on more images:\n  {show}")

    def report(self) -> None:
        """The weights must be those of the search, which suit all dilations."""
        cfg = self.trainer.cfg
        if not comm.is_main_process() or not cfg.SEARCH.SCORE_IMAGES:
            return
        try:
            with preserved_random_states():
                images = cfg.SEARCH.SCORE_IMAGES
                logger.info(score_report(cfg, self.trainer.model, images, comm.get_world_size()))
        except Exception as error:  # the run goes on, or its result has been written
            logger.warning(f"no score of the architecture: {one_line(error)}")


def check_ranks_agree(searched: Dict[str, nn.Module]) -> None:
    """Raise NATSError on all ranks if α differs on any of them by a bit; it names the layers."""
    if comm.get_world_size() == 1:
        return
    flat = torch.cat([conv.alpha.detach().flatten() for conv in searched.values()])
    reference = flat.clone()
    torch.distributed.broadcast(reference, src=0)
    sizes = [conv.alpha.numel() for conv in searched.values()]
    pieces = zip(flat.split(sizes), reference.split(sizes))
    differs = flat.new_tensor([float(not torch.equal(own, first)) for own, first in pieces])
    torch.distributed.all_reduce(differs)
    layers = [name for name, count in zip(searched, differs.tolist()) if count]
    if layers:
        raise NATSError(
            f"α differs between the ranks in {', '.join(layers[:5])}. Resume from the last "
            "checkpoint; if it happens again, suspect the hardware"
        )
