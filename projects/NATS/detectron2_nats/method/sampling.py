"""Beyond the paper: a super-network that draws one genotype per group instead of mixing all."""

from typing import List, Optional, Sequence, Tuple

import torch
from torch import nn

from .decode import Segment, merged
from .layers import GroupedDilationConv2d, MixedDilationConv2d
from .search_space import Dilation


class SampledDilationConv2d(MixedDilationConv2d):
    """A searched conv that costs what the frozen one does, with one weight for all genotypes.

    In training each group draws one genotype with probability softmax(α_i), anew at each pass, and
    the conv computes what the frozen one would. In evaluation each group takes the genotype that it
    votes for. α's gradient is that of the mixture, taken where the draw lies: straight through.

    Attributes:
        choice: (N,), which genotype each group has been given for good; -1 while it is searched.
        settled: the segments of that choice, None while it is searched. In training and evaluation
            the conv then computes them, whatever α is.
    """

    settled: Optional[Tuple[Segment, ...]] = None

    def __init__(self, conv: nn.Conv2d, *, genotypes: Sequence[Dilation], num_groups: int):
        super().__init__(conv, genotypes=genotypes, num_groups=num_groups, share_weights=True)
        self.register_buffer("choice", torch.full((num_groups,), -1, device=self.weight.device))

    def settle(self, segments: Sequence[Segment]) -> None:
        """End its search: from now on it is the frozen conv of these segments, in voted order."""
        dilations = [tuple(dilation) for channels, *dilation in segments for _ in range(channels)]
        per_group = self.out_channels // self.num_groups
        choice = [self.genotypes.index(dilation) for dilation in dilations[::per_group]]
        self.choice.copy_(torch.tensor(choice))
        self.settled = tuple(self._segments(choice))

    def _segments(self, choice: Sequence[int]) -> List[Segment]:
        per_group = self.out_channels // self.num_groups
        return merged((per_group, *self.genotypes[g]) for g in choice)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if prefix + "weight" in state_dict:  # a plain conv's settles nothing
            state_dict.setdefault(prefix + "choice", torch.full((self.num_groups,), -1))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        choice = self.choice.tolist()
        self.settled = None if min(choice) < 0 else tuple(self._segments(choice))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See :meth:`MixedDilationConv2d.forward`."""
        if self.settled:
            return GroupedDilationConv2d(self, self.settled).forward(x)
        shares = self.alpha.softmax(dim=1)
        drawn = torch.multinomial(shares.detach(), 1) if self.training else shares.argmax(1)
        if not self.trains_alpha:
            segments = self._segments(drawn.flatten().tolist())
            return GroupedDilationConv2d(self, segments).forward(x)
        one_hot = torch.zeros_like(shares).scatter_(1, drawn.view(-1, 1), 1)
        # one_hot's value, to the bit
        return self._finish(self.mixture(x, one_hot + (shares - shares.detach())))
