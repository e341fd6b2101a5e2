"""The two convs of NATS: the mixture that is searched and the frozen choice.

Shapes: B batch, C_in and C_out channels, N channel groups, G genotypes.

Both take over the parameters of the plain conv that they replace, under the same names: nothing
is renamed, split or permuted, so plain checkpoints load into either as they are.
"""

from typing import List, Sequence, Tuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from detectron2.layers import Conv2d

from .convolution import conv2d, dilated_conv2d
from .errors import NATSError
from .search_space import Dilation

__all__ = ["MixedDilationConv2d", "GroupedDilationConv2d"]

_FEW_CHANNELS = 128  # as in res3 of ResNets, and in all stages of ResNeXts


class _DilationConv2d(Conv2d):
    """A 3×3 conv whose dilation is chosen per output channel; `dilation` is the base one."""

    def __init__(self, conv: nn.Conv2d):
        if conv.kernel_size != (3, 3) or conv.padding != conv.dilation:
            raise NATSError(
                "expected a 3x3 conv whose padding equals its dilation, got kernel "
                f"{conv.kernel_size}, padding {conv.padding}, dilation {conv.dilation}"
            )
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            kernel_size=3,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            norm=getattr(conv, "norm", None),
            activation=getattr(conv, "activation", None),
            device="meta",  # the parameters are taken over just below
        )
        self.weight = conv.weight
        self.bias = conv.bias
        self.training = conv.training  # the norm keeps its own mode

    def _effective(self, genotype: Dilation) -> Tuple[int, int]:
        """A base dilation (DC5's res5) multiplies the genotype's."""
        return self.dilation[0] * genotype[0], self.dilation[1] * genotype[1]

    def _finish(self, y: torch.Tensor) -> torch.Tensor:
        if self.norm is not None:
            y = self.norm(y)
        if self.activation is not None:
            y = self.activation(y)
        return y


class MixedDilationConv2d(_DilationConv2d):
    """The super-network's conv: a mixture of genotypes per channel group (section 3.2).

    Every genotype g convolves the whole input into all C_out channels, y^g; channel group i is
    then y_i = Σ_g softmax(α_i)^g · y^g_i. One norm and activation, shared by all, follow.

    Args:
        conv: the plain conv to replace; its parameters and norm are taken over.
        genotypes: G dilation pairs, the first (1, 1).
        num_groups: N; must divide C_out, and hold whole conv groups.
        share_weights: no replicas, one weight under all dilations.

    Attributes:
        weight: (C_out, C_in / groups, 3, 3), genotype 0's replica.
        replicas: (G - 1, C_out, C_in / groups, 3, 3), the others', copies of `weight` at the
            start; absent when weights are shared.
        alpha: (N, G), zero at the start.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        *,
        genotypes: Sequence[Dilation],
        num_groups: int,
        share_weights: bool = False,
    ):
        super().__init__(conv)
        self.genotypes = tuple(genotypes)
        self.num_groups = num_groups
        num_replicas = 0 if share_weights else len(self.genotypes) - 1
        if num_replicas:
            self.replicas = nn.Parameter(
                self.weight.detach().expand(num_replicas, *self.weight.shape).clone(),
                requires_grad=self.weight.requires_grad,
            )
        else:
            self.register_parameter("replicas", None)
        # α's gradient needs each y^g. They are kept for it, or computed again in backward where
        # that is cheap: the work for one number is 9 × this many products.
        self._recomputed = self.weight.shape[1] <= _FEW_CHANNELS
        # float32 whatever the weights are: Adam's steps of 0.01 are lost in half precision
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.alpha = nn.Parameter(
            torch.zeros(num_groups, len(self.genotypes), dtype=dtype, device=self.weight.device)
        )

    def genotype_weights(self) -> List[torch.Tensor]:
        """The weight of each genotype, G times (C_out, C_in / groups, 3, 3)."""
        if self.replicas is None:
            return [self.weight] * len(self.genotypes)
        # not indexed one by one: each index would fill a gradient of all replicas' size with zeros
        return [self.weight, *self.replicas.unbind()]

    def frozen_weight(self, runs: Sequence[Tuple[int, int, int]]) -> torch.Tensor:
        """The weight of a frozen conv: each row from the replica of the dilation that it is given.

        Args:
            runs: (output channels, d_h, d_w), decoded in voted order: only there is a row's
                dilation the one that it was trained under.

        Returns:
            (C_out, C_in / groups, 3, 3), detached.
        """
        weights = self.genotype_weights()
        pieces, start = [], 0
        for channels, *dilation in runs:
            weight = weights[self.genotypes.index(tuple(dilation))]
            pieces.append(weight.detach()[start : start + channels])
            start += channels
        return torch.cat(pieces)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: (B, C_in, H, W).

        Returns:
            (B, C_out, H / stride, W / stride).
        """
        if self._recomputed and self.alpha.requires_grad and torch.is_grad_enabled():
            mixed = checkpoint(self._mix, x, use_reentrant=False, preserve_rng_state=False)
        else:
            mixed = self._mix(x)
        if self.bias is not None:
            mixed = mixed + self.bias.to(mixed.dtype).view(1, -1, 1, 1)
        return self._finish(mixed)

    def _mix(self, x: torch.Tensor) -> torch.Tensor:
        # (C_out, G): the weight of each genotype in each output channel
        mixture = self.alpha.softmax(dim=1).repeat_interleave(
            self.out_channels // self.num_groups, dim=0
        )
        # The outputs are scaled, not the weights: y^g is then kept for backward only while α is
        # trained. Scaled weights would be kept always, one for each genotype.
        mixed = None
        columns = mixture.unbind(dim=1)
        for genotype, scale, weight in zip(self.genotypes, columns, self.genotype_weights()):
            dilation = self._effective(genotype)
            y = conv2d(x, weight, self.stride, dilation, self.groups)
            # Under AMP in half precision, too: for a float32 scale CUDA's autocast would turn each
            # y^g into float32 and keep that.
            scale = scale.to(y.dtype).view(1, -1, 1, 1)
            mixed = y * scale if mixed is None else torch.addcmul(mixed, y, scale)
        return mixed

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # A plain conv's checkpoint: every replica starts from its weight, α stays as it is. So do
        # the replicas when the checkpoint's weights were shared.
        if prefix + "weight" in state_dict:
            state_dict.setdefault(prefix + "alpha", self.alpha.detach())
            if self.replicas is not None and prefix + "replicas" not in state_dict:
                weight = state_dict[prefix + "weight"]
                state_dict[prefix + "replicas"] = weight.expand(len(self.replicas), *weight.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        shared = ", shared weights" if self.replicas is None else ""
        return f"{super().extra_repr()}, {self.num_groups} groups of {list(self.genotypes)}{shared}"


class GroupedDilationConv2d(_DilationConv2d):
    """The frozen network's conv: each output channel has its own dilation (section 3.3).

    One conv per distinct dilation, over the rows of `weight` that use it and all input channels;
    the outputs are put back in channel order in one pass (:func:`.convolution.dilated_conv2d`).
    Same parameters and FLOPs as the plain conv. With conv groups (ResNeXt) a run holds whole ones
    and each reads its own input slice. Differentiable once.

    Args:
        conv: the plain conv to replace; its parameters and norm are taken over.
        runs: (output channels, d_h, d_w), in channel order; the channels add up to C_out.

    Raises:
        NATSError: the runs do not add up, or cut a conv group.
    """

    _inputs: List[int]  # declared here for TorchScript: it may be empty

    def __init__(self, conv: nn.Conv2d, runs: Sequence[Tuple[int, int, int]]):
        super().__init__(conv)
        self.runs = [tuple(run) for run in runs]
        total = sum(channels for channels, _, _ in self.runs)
        if total != self.out_channels:
            raise NATSError(f"runs of {total} channels do not fit {self.out_channels} channels")
        rows_per_group = self.out_channels // self.groups
        if self.groups > 1 and any(channels % rows_per_group for channels, _, _ in self.runs):
            raise NATSError(f"runs {self.runs} cut conv groups of {rows_per_group} channels")

        # plain lists of ints, so that TorchScript can read them
        self._channels: List[int] = [channels for channels, _, _ in self.runs]
        per_group = self.in_channels // self.groups
        self._inputs = []  # without conv groups each run reads all
        if self.groups > 1:
            self._inputs = [n // rows_per_group * per_group for n in self._channels]
        branches = {}  # dilation -> its runs
        for index, (_, *dilation) in enumerate(self.runs):
            branches.setdefault(tuple(dilation), []).append(index)
        self._branches: List[List[int]] = list(branches.values())
        self._dilations: List[List[int]] = [list(self._effective(d)) for d in branches]
        self._all_plain: bool = list(branches) == [(1, 1)]
        # In channels_last oneDNN need not bring x into a layout of its own once per branch. The
        # convs that follow get that layout too; without AVX-512 their gradients are slower in it.
        processor = torch.backends.cpu.get_cpu_capability()
        several = len(branches) > 1
        self._channels_last: bool = several and processor in ("AVX2", "AVX512")
        self._channels_last_in_training: bool = several and processor == "AVX512"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: (B, C_in, H, W).

        Returns:
            (B, C_out, H / stride, W / stride).
        """
        if self._all_plain:  # the plain conv's gradients too, bit for bit
            return self._finish(self._conv_forward(x, self.weight, self.bias))
        wanted = self._channels_last
        if torch.is_grad_enabled() and not torch.jit.is_tracing():
            wanted = self._channels_last_in_training
        if wanted and not x.is_cuda:
            x = x.contiguous(memory_format=torch.channels_last)
        y = dilated_conv2d(
            x,
            self.weight,
            self.bias,
            self.stride,
            self._inputs,
            self._channels,
            self._dilations,
            self._branches,
        )
        return self._finish(y)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, runs={self.runs}"
