"""Beyond the paper: a super-network that draws one genotype per group instead of mixing all."""

from typing import Optional, Sequence, Tuple

import torch
from torch import nn

from .decode import Segment
from .layers import GroupedDilationConv2d, MixedDilationConv2d
from .search_space import Dilation


class SampledDilationConv2d(MixedDilationConv2d):
    """A searched conv that costs what the frozen one does, with one weight for all genotypes.

    In training each group draws one genotype with probability softmax(α_i), anew at each pass, and
    the conv computes what the frozen one would. In evaluation each group takes the genotype that it
    votes for. α's gradient is that of the mixture, taken where the draw lies: straight through.

    Attributes:
        settled: the segments that it computes from now on, in training and evaluation, whatever α
            is; None while it is searched.
    """

    settled: Optional[Tuple[Segment, ...]] = None

    def __init__(self, conv: nn.Conv2d, *, genotypes: Sequence[Dilation], num_groups: int):
        super().__init__(conv, genotypes=genotypes, num_groups=num_groups, share_weights=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See :meth:`MixedDilationConv2d.forward`."""
        if self.settled:
            return GroupedDilationConv2d(self, self.settled).forward(x)
        shares = self.alpha.softmax(dim=1)
        chosen = torch.multinomial(shares.detach(), 1) if self.training else shares.argmax(1)
        if not self.trains_alpha:
            per_group = self.out_channels // self.num_groups
            segments = [(per_group, *self.genotypes[g]) for g in chosen.flatten().tolist()]
            return GroupedDilationConv2d(self, segments).forward(x)
        one_hot = torch.zeros_like(shares).scatter_(1, chosen.view(-1, 1), 1)
        return self._mixture(x, one_hot + (shares - shares.detach()))  # one_hot's value, to the bit

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sampled"
