"""What is logged and checked of α while a search runs."""

import logging
from typing import Dict, List

import torch
from torch import nn

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from ..errors import NATSError
from ..method.decidedness import Decidedness, all_votes
from ..method.decode import intensities

logger = logging.getLogger(__name__)


class AlphaHook(HookBase):
    """Logs the state of α, and checks that α is equal on all ranks.

    Attributes:
        last_votes: layer → votes at the last line of the log.
        tenth_votes: layer → votes when the last tenth of the search began; empty before that.
        full_tenth_votes: layer → votes when the last full tenth ended, whichever it was.
    """

    def __init__(self, log_period: int, check_period: int):
        self._log_period, self._check_period = log_period, check_period
        self.last_votes: Dict[str, List[int]] = {}
        self.tenth_votes: Dict[str, List[int]] = {}
        self.full_tenth_votes: Dict[str, List[int]] = {}

    def after_step(self):
        if self.trainer.frozen_at is not None:
            return
        done = self.trainer.iter + 1
        if done > self.trainer.alpha_start and done % self._check_period == 0:
            check_ranks_agree(self.trainer.searched)
        if self._ends(done):
            check_ranks_agree(self.trainer.searched)
            self.trainer.freeze()
        last = done in (self.trainer.max_iter, self.trainer.frozen_at)
        if last or done % self._log_period == 0:
            self._log()

    def _ends(self, done: int) -> bool:
        """Whether the choice is to be frozen now; keeps the votes at the end of each tenth."""
        trainer, end = self.trainer, self.trainer.search_end
        if done * 10 // end > (done - 1) * 10 // end:
            now, before = all_votes(trainer.alphas()), self.full_tenth_votes
            self.full_tenth_votes = now
            early = trainer.cfg.SEARCH.FREEZE_WHEN_DECIDED and before and done < trainer.max_iter
            if early and Decidedness.of(trainer.alphas(), before).decided:
                self.tenth_votes = before
                return True
            if done >= 0.9 * end and not self.tenth_votes:
                self.tenth_votes = now
        return end <= done < trainer.max_iter

    def _log(self):
        storage, alphas = get_event_storage(), self.trainer.alphas()
        chosen = all_votes(alphas)
        groups = [
            vote != before
            for name, votes in chosen.items()
            for vote, before in zip(votes, self.last_votes.get(name, [0] * len(votes)))
        ]
        changed, self.last_votes = sum(groups), chosen
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
