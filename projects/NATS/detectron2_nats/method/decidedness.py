"""How decided a search is: is what it decodes to more than chance?"""

from dataclasses import asdict, dataclass
from math import log
from typing import Dict, List, Mapping, Optional

import numpy as np
import torch
import torch.nn.functional as F

from .decode import votes

LEAD = 0.1
"""A group leads when its best genotype has so much more of softmax(α) than the second."""

_DECIDED, _UNSETTLED = 0.75, 0.05


def all_votes(alphas: Mapping[str, np.ndarray]) -> Dict[str, List[int]]:
    """Layer → the genotype index that each group votes for; plain ints."""
    return {name: votes(alpha).tolist() for name, alpha in alphas.items()}


@dataclass(frozen=True)
class Decidedness:
    """Where all α of a search stand.

    Attributes:
        entropy: of softmax(α), mean over the groups, as a share of its maximum; 1 at the start.
        leading: share of the groups whose best genotype leads the second by more than LEAD.
        changed: share of the groups whose vote changed in the search's last tenth; None before.
    """

    entropy: float
    leading: float
    changed: Optional[float] = None

    @classmethod
    def of(
        cls, alphas: Mapping[str, np.ndarray], before: Optional[Mapping[str, List[int]]] = None
    ) -> "Decidedness":
        """Measure it.

        Args:
            alphas: layer → α, (N, G).
            before: the votes when the last tenth began, as :func:`all_votes` gives them.
        """
        entropies, leads = [], []
        for alpha in alphas.values():
            shares = torch.as_tensor(alpha).double().softmax(dim=1)
            most = log(max(shares.shape[1], 2))
            entropies.append(torch.special.entr(shares).sum(dim=1).mean() / most)
            best, second = F.pad(shares, (0, 1)).topk(2, dim=1).values.unbind(dim=1)
            leads.append(best - second)
        changed = None
        if before:
            now = all_votes(alphas)
            pairs = [pair for name in now for pair in zip(now[name], before[name])]
            changed = float(np.mean([a != b for a, b in pairs]))
        leading = (torch.cat(leads) > LEAD).double().mean()
        return cls(float(sum(entropies) / len(entropies)), float(leading), changed)

    @property
    def decided(self) -> bool:
        """Whether the result may be taken as it is."""
        return self.leading >= _DECIDED and (self.changed or 0.0) <= _UNSETTLED

    def verdict(self) -> str:
        """One plain sentence, with what to do where it is not decided."""
        if self.decided:
            return "decided: most groups have a clear favourite, and it no longer changes"
        advice = "search longer, raise SEARCH.ALPHA_LR, or decode with SEARCH.DECODE_MARGIN"
        if self.leading >= _DECIDED:
            return f"not settled, votes still change: {advice}"
        return f"undecided, {self.leading:.0%} of the groups have a clear favourite: {advice}"

    def summary(self) -> Dict[str, object]:
        """Rounded plain values and the verdict, for architecture.yaml."""
        values = {k: round(v, 4) for k, v in asdict(self).items() if v is not None}
        return {**values, "verdict": self.verdict()}

    def __str__(self) -> str:
        changed = "" if self.changed is None else f", {self.changed:.0%} changed in the last tenth"
        return f"entropy {self.entropy:.4f} of 1, {self.leading:.0%} of the groups lead{changed}"
