"""The two convs of NATS: the mixture that is searched and the frozen choice.

Shapes: B batch, C_in and C_out channels, k_h × k_w kernel (3 × 3 in the paper), N channel groups,
G genotypes. Both map x, (B, C_in, H, W), to (B, C_out, H / stride, W / stride).

Both take over the parameters of the plain conv that they replace, under the same names: nothing
is renamed, split or permuted, so plain checkpoints load into either as they are.
"""

from typing import List, Optional, Sequence, Tuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from ..errors import NATSError
from .decode import Segment, merged
from .search_space import Dilation
from .speed import fast_layouts, pads_first, recomputed, to_fast_layout

# What torch.fx takes as one call: inside, they look at values that it does not have.
torch.fx.wrap("to_fast_layout")
torch.fx.wrap("_convolve")


def dilated(conv: nn.Conv2d, genotype: Dilation = (1, 1)) -> Tuple[Dilation, Tuple[int, int]]:
    """The dilation of a conv when `genotype` multiplies it, as it does a stage's own (DC5), and the
    padding that then keeps the size of the map: per side dilation · (kernel - 1) / 2.

    Raises:
        NATSError: the conv's own padding is another.
    """
    plain = tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size))
    is_odd = all(k % 2 for k in conv.kernel_size) and max(conv.kernel_size) > 1
    if not is_odd or conv.padding_mode != "zeros" or conv.padding not in ("same", plain):
        expected = f"{plain} of zeros" if is_odd else "an odd kernel above 1"
        raise NATSError(
            f"kernel {conv.kernel_size}, padding {conv.padding} of {conv.padding_mode}, not "
            f"{expected}"
        )
    dilation = tuple(d * g for d, g in zip(conv.dilation, genotype))
    return dilation, tuple(p * g for p, g in zip(plain, genotype))


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
            padding=dilated(conv)[1],
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
    """

    layer = ""

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._finish(self.mixture(x, self.alpha.softmax(dim=1)))

    def mixture(self, x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Σ_g share of g · y^g, before the norm.

        Args:
            shares: (N, G), of the genotypes in each group.
        """
        shares = shares.repeat_interleave(self.out_channels // self.num_groups, dim=0)

        def mix(x: torch.Tensor) -> torch.Tensor:
            # The outputs are scaled, not the weights: y^g is then kept for backward only while α is
            # trained. Scaled weights would be kept always, one for each genotype.
            mixed = None
            genotypes = zip(self.genotypes, self.genotype_weights(), shares.unbind(dim=1))
            for genotype, weight, share in genotypes:
                dilation, padding = dilated(self, genotype)
                y = F.conv2d(x, weight, None, self.stride, padding, dilation, self.groups)
                # Under AMP in half precision, too: for a float32 share CUDA's autocast would turn
                # each y^g into float32 and keep that.
                share = share.to(y.dtype).view(1, -1, 1, 1)
                mixed = y * share if mixed is None else torch.addcmul(mixed, y, share)
            return mixed

        # α's gradient needs each y^g
        mixed = recomputed(mix, x, self.weight.shape[1]) if self.trains_alpha else mix(x)
        if self.bias is not None:
            mixed = mixed + self.bias.to(mixed.dtype).view(1, -1, 1, 1)
        return mixed

    @property
    def trains_alpha(self) -> bool:
        """Whether this pass is for α (:func:`.alpha.alpha_training`)."""
        return self.alpha.requires_grad and torch.is_grad_enabled()

    def genotype_weights(self) -> List[torch.Tensor]:
        """The weight of each genotype, G times (C_out, C_in / groups, k_h, k_w)."""
        if self.replicas is None:
            return [self.weight] * len(self.genotypes)
        # not indexed one by one: each index would fill a gradient of all replicas' size with zeros
        return [self.weight, *self.replicas.unbind()]

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # A plain conv's checkpoint: every replica starts from its weight, α stays as it is. So do
        # the replicas when the checkpoint's weights were shared.
        if prefix + "weight" in state_dict:
            state_dict.setdefault(prefix + "alpha", self.alpha.detach())
            if self.replicas is not None and prefix + "replicas" not in state_dict:
                weight = state_dict[prefix + "weight"]
                state_dict[prefix + "replicas"] = weight.expand(len(self.replicas), *weight.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


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

    def __init__(self, conv: nn.Conv2d, segments: Sequence[Segment]):
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
        inputs_per_group = self.in_channels // self.groups if self.groups > 1 else 0
        self._sizes = [
            (channels, channels // rows_per_group * inputs_per_group)
            for channels, _, _ in self.segments
        ]
        genotypes = [tuple(genotype) for _, *genotype in self.segments]
        depthwise = self.in_channels == self.groups > 1
        self._branches = []
        for genotype in dict.fromkeys(genotypes):
            dilation, padding = dilated(self, genotype)
            indices = [i for i, other in enumerate(genotypes) if other == genotype]
            self._branches.append((dilation, padding, pads_first(padding, depthwise), indices))
        self._fast_layouts = fast_layouts(len(self._branches), depthwise)
        self.padding = "one for each dilation"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._finish(self._conv_forward(x, self.weight, self.bias))

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]
    ) -> torch.Tensor:
        """Where PyTorch's convs convolve, for who calls it with a weight of his own."""
        x = to_fast_layout(input, self._fast_layouts)
        return _convolve(x, weight, bias, self.stride, self._sizes, self._branches)


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    stride: Tuple[int, int],
    sizes: Sequence[Tuple[int, int]],
    branches: Sequence[Tuple[Dilation, Tuple[int, int], bool, Sequence[int]]],
) -> torch.Tensor:
    """One conv per dilation, over the rows that have it; outputs in channel order (section 3.3).

    Args:
        sizes: number of channels that each segment writes, and reads (0: all).
        branches: of each dilation, a base dilation included: (height, width), padding, whether that
            is a step of its own (:func:`.speed.pads_first`), and the segments that have it.
    """
    outputs, inputs = zip(*sizes)
    rows = _cut(weight, outputs, 0)
    biases = _cut(bias, outputs, 0) if bias is not None else None
    slices = _cut(x, inputs, 1) if inputs[0] else None
    pieces = {}
    for dilation, padding, apart, segments in branches:
        own_rows = _joined([rows[i] for i in segments], 0)
        own_bias = _joined([biases[i] for i in segments], 0) if biases else None
        read = _joined([slices[i] for i in segments], 1) if slices else x
        groups = read.shape[1] // own_rows.shape[1]
        if apart and not x.is_cuda:
            read = F.pad(read, [padding[1], padding[1], padding[0], padding[0]])
            padding = (0, 0)
        y = F.conv2d(read, own_rows, own_bias, stride, padding, dilation, groups)
        pieces.update(zip(segments, _cut(y, [outputs[i] for i in segments], 1)))
    return _joined([pieces[i] for i in range(len(sizes))], 1)


def _cut(tensor: torch.Tensor, sizes: Sequence[int], dim: int) -> Sequence[torch.Tensor]:
    """Consecutive pieces of `tensor` along `dim`; of these sizes, which add up to it."""
    if len(sizes) == 1:
        return [tensor]
    if torch.is_grad_enabled() and not torch.jit.is_tracing():
        # its backward is one cat(); that of each narrow() fills a gradient of the tensor's size
        return tensor.split(list(sizes), dim)
    # exporters (under no_grad) fold a weight's narrow() into a constant, not its split()
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [tensor.narrow(dim, end - size, size) for end, size in zip(ends, sizes)]


def _joined(pieces: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """The concatenation; no copy of a single piece."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
