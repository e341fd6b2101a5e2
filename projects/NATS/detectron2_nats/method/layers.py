"""The two convs of NATS: the mixture that is searched and the frozen choice.

Shapes: B batch, C_in and C_out channels, k_h × k_w kernel (3 × 3 in the paper), N channel groups,
G genotypes.

Both take over the parameters of the plain conv that they replace, under the same names: nothing
is renamed, split or permuted, so plain checkpoints load into either as they are.
"""

from typing import List, Optional, Sequence, Tuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from ..errors import NATSError
from .search_space import Dilation
from .speed import fast_layouts, pads_first, recomputed, to_fast_layout

# What torch.fx takes as one call: inside, they look at values that it does not have.
torch.fx.wrap("to_fast_layout")
torch.fx.wrap("_convolve")


def same_padding(conv: nn.Conv2d, genotype: Dilation = (1, 1)) -> Tuple[int, int]:
    """The padding that leaves a conv's output as large as it is, when `genotype` multiplies its
    dilation: per side dilation · (kernel - 1) / 2.

    Raises:
        NATSError: the conv's own padding is another.
    """
    plain = [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size)]
    is_odd = all(k % 2 for k in conv.kernel_size) and max(conv.kernel_size) > 1
    if not is_odd or conv.padding_mode != "zeros" or conv.padding not in ("same", tuple(plain)):
        expected = f"{tuple(plain)} of zeros" if is_odd else "an odd kernel above 1"
        raise NATSError(
            f"kernel {conv.kernel_size}, padding {conv.padding} of {conv.padding_mode}, not "
            f"{expected}"
        )
    return plain[0] * genotype[0], plain[1] * genotype[1]


class _DilationConv2d(nn.Conv2d):
    """A conv whose dilation is chosen per output channel; `dilation` is the base one.

    Attributes:
        norm, activation: of Detectron2's convs, which hold their own; None elsewhere.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            padding=same_padding(conv),
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",  # the parameters are taken over just below
        )
        self.norm = getattr(conv, "norm", None)
        self.activation = getattr(conv, "activation", None)
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
        weight: (C_out, C_in / groups, k_h, k_w), genotype 0's replica.
        replicas: (G - 1, C_out, C_in / groups, k_h, k_w), the others', copies of `weight` at the
            start; absent when weights are shared.
        alpha: (N, G), zero at the start.
        layer: its name in the architecture, given by :func:`.to_supernet`.
        by_path: whether that is its path in the network, and not a residual network's name.
    """

    layer = ""
    by_path = False

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
        # float32 whatever the weights are: Adam's steps of 0.01 are lost in half precision
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.alpha = nn.Parameter(
            torch.zeros(num_groups, len(self.genotypes), dtype=dtype, device=self.weight.device)
        )

    def genotype_weights(self) -> List[torch.Tensor]:
        """The weight of each genotype, G times (C_out, C_in / groups, k_h, k_w)."""
        if self.replicas is None:
            return [self.weight] * len(self.genotypes)
        # not indexed one by one: each index would fill a gradient of all replicas' size with zeros
        return [self.weight, *self.replicas.unbind()]

    def frozen_weight(self, segments: Sequence[Tuple[int, int, int]]) -> torch.Tensor:
        """The weight of a frozen conv: each row from the replica of the dilation that it is given.

        Args:
            segments: (output channels, d_h, d_w), decoded in voted order: only there is a row's
                dilation the one that it was trained under.

        Returns:
            (C_out, C_in / groups, k_h, k_w), detached.
        """
        weights = self.genotype_weights()
        pieces, start = [], 0
        for channels, *dilation in segments:
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
        return self._mixture(x, self.alpha.softmax(dim=1))

    def _mixture(self, x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """The output where genotype g has `shares` (N, G) of each group."""
        if self.trains_alpha:  # its gradient needs each y^g
            mixed = recomputed(lambda x: self._mix(x, shares), x, self.weight.shape[1])
        else:
            mixed = self._mix(x, shares)
        if self.bias is not None:
            mixed = mixed + self.bias.to(mixed.dtype).view(1, -1, 1, 1)
        return self._finish(mixed)

    @property
    def trains_alpha(self) -> bool:
        """Whether this pass is for α (:func:`.alpha.alpha_training`)."""
        return self.alpha.requires_grad and torch.is_grad_enabled()

    def _mix(self, x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        shares = shares.repeat_interleave(self.out_channels // self.num_groups, dim=0)
        # The outputs are scaled, not the weights: y^g is then kept for backward only while α is
        # trained. Scaled weights would be kept always, one for each genotype.
        mixed = None
        columns = shares.unbind(dim=1)
        for genotype, scale, weight in zip(self.genotypes, columns, self.genotype_weights()):
            dilation, padding = self._effective(genotype), same_padding(self, genotype)
            y = F.conv2d(x, weight, None, self.stride, padding, dilation, self.groups)
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
        how = ", shared weights" if self.replicas is None else ""
        return f"{super().extra_repr()}, {self.num_groups} groups of {list(self.genotypes)}{how}"


class GroupedDilationConv2d(_DilationConv2d):
    """The frozen network's conv: each output channel has its own dilation (section 3.3).

    For each dilation: convolve the rows of `weight` that have it with all input channels; then put
    the outputs in channel order. Same parameters and FLOPs as the plain conv. With conv groups
    (ResNeXt, depthwise) a segment holds whole ones, and each reads its own input channels.

    Args:
        conv: the plain conv to replace; its parameters and norm are taken over.
        segments: (output channels, d_h, d_w), in channel order; the channels add up to C_out.

    Attributes:
        padding: a text that PyTorch refuses. Programs that fold a norm into a new `nn.Conv2d` copy
            the padding, and some of them no dilation: they stop, instead of losing it.

    Raises:
        NATSError: the segments do not add up, or cut a conv group.
    """

    _inputs: List[int]  # declared here: TorchScript cannot tell the type of an empty list

    def __init__(self, conv: nn.Conv2d, segments: Sequence[Tuple[int, int, int]]):
        super().__init__(conv)
        self.segments = merged(segments)
        total = sum(channels for channels, _, _ in self.segments)
        if total != self.out_channels:
            raise NATSError(f"segments of {total} channels do not fit {self.out_channels} channels")
        rows_per_group = self.out_channels // self.groups
        if self.groups > 1 and any(channels % rows_per_group for channels, _, _ in self.segments):
            raise NATSError(
                f"segments {self.segments} cut conv groups of {rows_per_group} channels"
            )

        # lists of ints, so that TorchScript can read them
        self._outputs: List[int] = [channels for channels, _, _ in self.segments]
        self._inputs = [
            channels // rows_per_group * (self.in_channels // self.groups)
            for channels in self._outputs
            if self.groups > 1
        ]
        places = {}  # dilation → its segments, counted in channel order
        for place, (_, *dilation) in enumerate(self.segments):
            places.setdefault(tuple(dilation), []).append(place)
        self._dilations: List[List[int]] = [list(self._effective(d)) for d in places]
        self._paddings: List[List[int]] = [list(same_padding(self, d)) for d in places]
        self._places: List[List[int]] = list(places.values())
        depthwise = self.in_channels == self.groups > 1
        self._fast_layouts: List[bool] = fast_layouts(len(places), depthwise)
        self._pads_first: List[bool] = [pads_first(p, depthwise) for p in self._paddings]
        self.padding = "one for each dilation"

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]
    ) -> torch.Tensor:
        """Where PyTorch's convs convolve, for who calls it with a weight of his own."""
        return _convolve(
            to_fast_layout(input, self._fast_layouts),
            weight,
            bias,
            self.stride,
            self._paddings,
            self._pads_first,
            self._dilations,
            self._places,
            self._outputs,
            self._inputs,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: (B, C_in, H, W).

        Returns:
            (B, C_out, H / stride, W / stride).
        """
        return self._finish(self._conv_forward(x, self.weight, self.bias))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, segments={self.segments}"


def merged(segments: Sequence[Sequence[int]]) -> List[Tuple[int, int, int]]:
    """Neighbours of equal dilation joined, so that equal architectures compare equal."""
    joined: List[Tuple[int, int, int]] = []
    for channels, d_h, d_w in segments:
        if joined and joined[-1][1:] == (d_h, d_w):
            channels += joined.pop()[0]
        joined.append((channels, d_h, d_w))
    return joined


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    stride: List[int],
    paddings: List[List[int]],
    pads_first: List[bool],
    dilations: List[List[int]],
    places: List[List[int]],
    outputs: List[int],
    inputs: List[int],
) -> torch.Tensor:
    """One conv per dilation, over the rows that have it; outputs in channel order (section 3.3).

    Args:
        paddings, dilations: (height, width) of each conv, a base dilation included.
        pads_first: see :func:`.speed.pads_first`.
        places: which segments have it.
        outputs, inputs: number of channels that each segment writes, and reads; `inputs` is empty
            where each reads all.
    """
    grouped = len(inputs) > 0
    rows = _cut(weight, outputs, 0)
    shifts = _cut(bias, outputs, 0) if bias is not None else []
    slices = _cut(x, inputs, 1) if grouped else []
    found = [x] * len(outputs)  # one per segment, each replaced in the loop
    for padding, pad_first, dilation, own in zip(paddings, pads_first, dilations, places):
        own_rows = _joined([rows[i] for i in own], 0)
        own_shifts = _joined([shifts[i] for i in own], 0) if bias is not None else None
        read = _joined([slices[i] for i in own], 1) if grouped else x
        groups = read.shape[1] // own_rows.shape[1]
        if pad_first and not x.is_cuda:
            read = F.pad(read, [padding[1], padding[1], padding[0], padding[0]])
            padding = [0, 0]
        y = F.conv2d(read, own_rows, own_shifts, stride, padding, dilation, groups)
        for i, piece in zip(own, _cut(y, [outputs[i] for i in own], 1)):
            found[i] = piece
    return _joined(found, 1)


def _cut(tensor: torch.Tensor, sizes: List[int], dim: int) -> List[torch.Tensor]:
    """Consecutive pieces of `tensor` along `dim`; of these sizes, which add up to it."""
    if len(sizes) == 1:
        return [tensor]
    if torch.is_grad_enabled() and not torch.jit.is_tracing():
        # its backward is one cat(); that of each narrow() fills a gradient of the tensor's size
        return list(tensor.split(sizes, dim))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    # exporters (under no_grad) fold a weight's narrow() into a constant, not its split()
    return [tensor.narrow(dim, end - size, size) for end, size in zip(ends, sizes)]


def _joined(pieces: List[torch.Tensor], dim: int) -> torch.Tensor:
    """The concatenation; no copy of a single piece."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
