"""The result of a search: the dilation of each output channel of each conv (section 3.3)."""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import numpy as np
from tabulate import tabulate
from torch import nn

from ..errors import NATSError, shown
from ..files import read_yaml, write_yaml
from .decode import Segment, decode_alpha, merged
from .names import searchable, searched_layers
from .search_space import CONVS, Dilation, SearchSpace, check_dilation, stage_of

FORMAT = "detectron2-nats/1"

Layers = Mapping[str, Tuple[Segment, ...]]
"""Layer name → segments."""

MAX_CHANNELS = 65536
"""Far above any conv's, and still cheap to read."""

_SHIPPED = os.path.join(os.path.dirname(__file__), "architectures")


@dataclass(frozen=True)
class Architecture:
    """Segments of dilations per layer.

    Args:
        layers: layer name (:mod:`.names`: "res3.0.conv2", "fpn_output2") → segments (output
            channels, d_h, d_w) in channel order. Names every 3×3 conv of each residual stage of
            which it names one.
        search: its origin (space, iteration, seed, …) in plain values; may be empty.

    Raises:
        NATSError: something is malformed; the message names the layer.
    """

    layers: Layers
    search: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        if not isinstance(self.layers, Mapping) or not self.layers:
            raise NATSError("architecture: 'layers' must map one or more layer names to segments")
        if not isinstance(self.search, Mapping):
            raise NATSError("architecture: 'search' must be a mapping")
        layers = {check_name(name): _check_segments(name, v) for name, v in self.layers.items()}
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "search", dict(self.search))

    @classmethod
    def decode(
        cls,
        supernet: nn.Module,
        order: str = "paper",
        margin: float = 0.0,
        at_most: int = 0,
        **search,
    ) -> "Architecture":
        """Decode a search's result (section 3.3). Stages searched in part are plain in the rest.

        Args:
            supernet: what :func:`to_supernet` gave, or a detector around it.
            order: "paper" or "voted", see :func:`decode_alpha`.
            margin, at_most: see :func:`votes`.
            search: the origin, recorded in the file.

        Raises:
            NATSError: nothing is searched in it.
        """
        convs = searched_layers(supernet)
        if not convs:
            raise NATSError("no conv is searched: decode what to_supernet made")
        layers = {}
        for name, conv in convs.items():
            alpha, channels = conv.alpha.detach().cpu().numpy(), conv.out_channels
            layers[name] = decode_alpha(alpha, conv.genotypes, channels, order, margin, at_most)
        origin = {**search, "order": order, "margin": margin, "at_most": at_most}
        origin = {k: v for k, v in origin.items() if v or k not in ("margin", "at_most")}
        return cls(_completed(supernet, layers), origin)

    @classmethod
    def random(cls, network: nn.Module, space: SearchSpace, seed: int = 0) -> "Architecture":
        """Each channel group of each conv draws its dilation among its pattern's, all equally.

        Args:
            network: on any device; its weights are not looked at.

        Raises:
            NATSError: a pattern matches nothing, or the groups do not fit a conv.
        """
        rng, layers = np.random.default_rng(seed), {}
        for name, conv in searchable(network, space.convs).items():
            genotypes = space.genotypes_of(name, conv.kernel_size)
            num_groups = space.groups_of(name, conv.out_channels, conv.groups)
            per_group = conv.out_channels // num_groups
            drawn = rng.choice(len(genotypes), size=num_groups)
            layers[name] = tuple((per_group, *genotypes[g]) for g in drawn)
        return cls(_completed(network, layers), {"method": "random", "seed": seed})

    @classmethod
    def uniform(
        cls, network: nn.Module, dilation: Dilation, convs: Sequence[str] = CONVS
    ) -> "Architecture":
        """One dilation in every conv that a pattern matches.

        Args:
            network: on any device; its weights are not looked at.
            convs: patterns of names.

        Raises:
            NATSError: a pattern matches nothing, or the dilation is malformed.
        """
        dilation = check_dilation(dilation)
        layers = {
            name: ((conv.out_channels, *dilation),)
            for name, conv in searchable(network, convs).items()
        }
        return cls(_completed(network, layers), {"method": "uniform"})

    # -- files and configs --------------------------------------------------------------------

    @classmethod
    def from_dict(cls, content: Any) -> "Architecture":
        """Read the content of an architecture file."""
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise NATSError(f"not an architecture file: expected a mapping with 'format: {FORMAT}'")
        # "names" said in files of before whether names were paths
        unknown = sorted(map(shown, set(content) - {"format", "names", "layers", "search"}))
        if unknown:
            raise NATSError(f"architecture: unknown keys {', '.join(unknown[:5])}")
        return cls(content.get("layers"), content.get("search") or {})

    @classmethod
    def from_config(cls, value: Sequence[Any]) -> "Architecture":
        """Read ``MODEL.NATS.ARCHITECTURE``: a list of [layer name, segments]."""
        is_list = isinstance(value, (list, tuple))
        if not is_list or not all(isinstance(v, (list, tuple)) and len(v) == 2 for v in value):
            raise NATSError("MODEL.NATS.ARCHITECTURE must be a list of [layer name, segments]")
        names = [check_name(name) for name, _ in value]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise NATSError(f"MODEL.NATS.ARCHITECTURE names layers twice: {', '.join(twice[:5])}")
        return cls(dict(value))

    def to_config(self) -> List[List[Any]]:
        """The value of ``MODEL.NATS.ARCHITECTURE``."""
        return [[name, [list(segment) for segment in v]] for name, v in self.layers.items()]

    @classmethod
    def load(cls, path: str) -> "Architecture":
        """Read an architecture file (YAML, safe loader, at most 8 MiB).

        Args:
            path: a file, or the name of one that the package ships, such as "bars_lying".

        Raises:
            NATSError: missing, too large, not YAML, or malformed; names the file.
        """
        if f"{path}.yaml" in os.listdir(_SHIPPED) and not os.path.exists(path):
            path = os.path.join(_SHIPPED, f"{path}.yaml")
        content = read_yaml(path)
        try:
            return cls.from_dict(content)
        except NATSError as error:
            raise NATSError(f"{path}: {error}") from None

    def save(self, path: str) -> None:
        """Write an architecture file. A kill leaves the old or the new one."""
        search = {"search": self.search} if self.search else {}
        write_yaml(path, {"format": FORMAT, "layers": self.layers, **search})

    # -- questions ----------------------------------------------------------------------------

    @property
    def stages(self) -> Tuple[str, ...]:
        """The residual stages that it changes, in order of first mention."""
        return tuple(filter(None, dict.fromkeys(map(stage_of, self.layers))))

    def channels_per_dilation(self, layer: str) -> Dict[Dilation, int]:
        """Output channels of each dilation in one layer."""
        counts: Dict[Dilation, int] = {}
        for channels, d_h, d_w in self.layers[layer]:
            counts[d_h, d_w] = counts.get((d_h, d_w), 0) + channels
        return dict(sorted(counts.items()))

    def shares(self) -> Dict[Dilation, float]:
        """The share of all output channels that has each dilation, most frequent first."""
        counts: Counter = Counter()
        for name in self.layers:
            counts.update(self.channels_per_dilation(name))
        return {dilation: n / counts.total() for dilation, n in counts.most_common()}

    def summary(self) -> str:
        """A table: each layer's channels per dilation, and the mean dilation of its channels.

        ::

            layer         channels per dilation    mean
            ------------  -----------------------  -------
            res3.0.conv2  1x1:64, 1x3:32, 3x3:32   1.5x2.0
        """
        rows = []
        for name in self.layers:
            counts = self.channels_per_dilation(name)
            text = ", ".join(f"{d_h}x{d_w}:{channels}" for (d_h, d_w), channels in counts.items())
            mean = np.average(list(counts), axis=0, weights=list(counts.values()))
            rows.append((name, text, "{:.1f}x{:.1f}".format(*mean)))
        headers = ("layer", "channels per dilation", "mean")
        widths = (None, 64, None)  # break lines: per-channel patterns have many dilations
        table = tabulate(rows, headers, disable_numparse=True, maxcolwidths=widths)
        return f"{table}\n\nDilations are height x width; a stage's own (DC5) multiplies them."


def _completed(network: nn.Module, layers: Layers) -> Layers:
    """The layers, and (1, 1) for the other convs of each residual stage that they touch.

    A network of another depth is then told by what an architecture lacks.
    """
    stages = {stage_of(name) for name in layers} - {""}
    rest = {name: conv for name, conv in searchable(network).items() if stage_of(name) in stages}
    return {**{name: ((conv.out_channels, 1, 1),) for name, conv in rest.items()}, **layers}


def check_name(name: Any) -> str:
    """Return a layer's name, or raise :class:`NATSError`."""
    # a ModuleDict's keys may be nearly anything
    if not isinstance(name, str) or not re.fullmatch(r"[!-~]{1,200}", name, re.ASCII):
        raise NATSError(
            f"architecture: layer name {shown(name)}: expected one like 'res3.0.conv2' or "
            "'fpn_output2'"
        )
    return name


def _check_segments(name: str, segments: Any) -> Tuple[Segment, ...]:
    if not isinstance(segments, (list, tuple)) or not segments or len(segments) > MAX_CHANNELS:
        raise NATSError(f"architecture: {name}: expected a list of [channels, d_h, d_w]")
    checked = []
    for segment in segments:
        is_triple = isinstance(segment, (list, tuple)) and len(segment) == 3
        if not is_triple or type(segment[0]) is not int or not 1 <= segment[0] <= MAX_CHANNELS:
            raise NATSError(
                f"architecture: {name}: expected [channels, d_h, d_w], got {shown(segment)}"
            )
        try:
            dilation = check_dilation(list(segment[1:]))
        except NATSError as error:
            raise NATSError(f"architecture: {name}: {error}") from None
        checked.append((segment[0], *dilation))
    return tuple(merged(checked))
