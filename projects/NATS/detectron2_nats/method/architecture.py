"""The result of a search: the dilation of each output channel of each conv (section 3.3)."""

import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
from tabulate import tabulate
from torch import nn

from ..errors import NATSError, shown
from ..files import OneLine, read_yaml, write_yaml
from . import draw
from .convs import searched_layers
from .decode import Segment, decode_alpha
from .layers import merged
from .search_space import STAGES, Dilation, SearchSpace, check_dilation

FORMAT = "detectron2-nats/1"

# Far above any ResNet (R-152 has 50 convs of at most 2048 channels), and still cheap to read.
MAX_LAYERS = 1000
MAX_CHANNELS = 65536

_SHIPPED = os.path.join(os.path.dirname(__file__), "architectures")


@dataclass(frozen=True)
class Architecture:
    """Segments of dilations per layer.

    Args:
        layers: layer name inside the residual network ("res3.0.conv2") → segments (output channels,
            d_h, d_w) in channel order. Names every 3×3 conv of each stage that it changes.
        search: its origin (space, iteration, seed, …) in plain values; may be empty.
        paths: the names are module paths instead, inside the network that was searched, and any
            convs of it.

    Raises:
        NATSError: something is malformed; the message names the layer.
    """

    layers: Mapping[str, Tuple[Segment, ...]]
    search: Mapping[str, Any] = field(default_factory=dict, compare=False)
    paths: bool = False

    def __post_init__(self):
        if not isinstance(self.layers, Mapping) or not self.layers:
            raise NATSError("architecture: 'layers' must map one or more layer names to segments")
        if len(self.layers) > MAX_LAYERS:
            raise NATSError(
                f"architecture: {len(self.layers)} layers, at most {MAX_LAYERS} allowed"
            )
        if not isinstance(self.search, Mapping):
            raise NATSError("architecture: 'search' must be a mapping")
        layers = {
            check_name(name, self.paths): _check_segments(name, v)
            for name, v in self.layers.items()
        }
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "search", dict(self.search))

    # -- from a search ------------------------------------------------------------------------

    @classmethod
    def decode(
        cls,
        supernet: Union[nn.Module, Mapping[str, nn.Module]],
        order: str = "paper",
        margin: float = 0.0,
        at_most: int = 0,
        **search,
    ) -> "Architecture":
        """Decode a search's result (section 3.3).

        Args:
            supernet: what :func:`to_supernet` gave, or a detector around it; or its searched
                convs, layer name → :class:`MixedDilationConv2d`.
            order: "paper" or "voted", see :func:`decode_alpha`.
            margin, at_most: see :func:`votes`.
            search: the origin, recorded in the file.

        Raises:
            NATSError: nothing is searched in it.
        """
        convs = searched_layers(supernet) if isinstance(supernet, nn.Module) else supernet
        if not convs:
            raise NATSError("no conv is searched: decode what to_supernet made")
        layers = {
            name: decode_alpha(
                conv.alpha.detach().cpu().numpy(),
                conv.genotypes,
                conv.out_channels,
                order,
                margin,
                at_most,
            )
            for name, conv in convs.items()
        }
        origin = {**search, "order": order, "margin": margin, "at_most": at_most}
        origin = {k: v for k, v in origin.items() if v or k not in ("margin", "at_most")}
        return cls(layers, origin, any(conv.by_path for conv in convs.values()))

    # -- without a search -----------------------------------------------------------------------
    # network: on any device. stages: of a residual network (:mod:`.stages`); or instead convs,
    # patterns of module paths in any network. All raise NATSError where a stage is missing, a
    # pattern matches nothing, or a dilation is malformed.

    @classmethod
    def random(
        cls,
        network: nn.Module,
        space: SearchSpace,
        seed: int = 0,
        plain: float = 0.0,
        uneven: bool = False,
    ) -> "Architecture":
        """Each channel group of each conv draws its dilation among those of its stage or pattern.

        Args:
            plain: this share of all groups stays (1, 1); the others are as without it.
            uneven: first draw the dilations' probabilities in each conv, uniformly among all that
                add up to 1. Such architectures differ more. Else all are equally probable.

        Raises:
            NATSError: also where the groups do not fit a conv.
        """
        layers = draw.random_layers(network, space, seed, plain, uneven)
        origin = {"method": "random", "seed": seed, **({"plain": plain} if plain else {})}
        return cls(layers, origin, bool(space.convs))

    @classmethod
    def uniform(
        cls,
        network: nn.Module,
        dilation: Dilation,
        stages: Sequence[str] = STAGES,
        convs: Sequence[str] = (),
    ) -> "Architecture":
        """One dilation in every conv of `stages`, or of `convs`."""
        layers = draw.uniform_layers(network, dilation, stages, convs)
        return cls(layers, {"method": "uniform"}, bool(convs))

    @classmethod
    def cycle(
        cls,
        network: nn.Module,
        dilations: Sequence[Dilation] = draw.CYCLE,
        stages: Sequence[str] = STAGES,
        convs: Sequence[str] = (),
    ) -> "Architecture":
        """Neighbouring channels, or conv groups (ResNeXt), take turns (PSConv's idea)."""
        layers = draw.cycle_layers(network, dilations, stages, convs)
        return cls(layers, {"method": "cycle", "dilations": draw.as_text(dilations)}, bool(convs))

    @classmethod
    def sawtooth(
        cls,
        network: nn.Module,
        dilations: Sequence[Dilation] = draw.SAWTOOTH,
        stages: Sequence[str] = STAGES,
        convs: Sequence[str] = (),
    ) -> "Architecture":
        """One dilation per conv, in turns over the depth (hybrid dilated convolution's idea)."""
        layers = draw.sawtooth_layers(network, dilations, stages, convs)
        origin = {"method": "sawtooth", "dilations": draw.as_text(dilations)}
        return cls(layers, origin, bool(convs))

    # -- files and configs --------------------------------------------------------------------

    @classmethod
    def from_dict(cls, content: Any) -> "Architecture":
        """Read the content of an architecture file."""
        if not isinstance(content, Mapping):
            raise NATSError(f"not an architecture file: expected a mapping with 'format: {FORMAT}'")
        known = {"format", "names", "layers", "search"}
        unknown = sorted(shown(key) for key in set(content) - known)
        if content.get("format") != FORMAT:
            raise NATSError(
                f"not an architecture file of this version: format is "
                f"{shown(content.get('format'))}, expected {FORMAT!r}"
            )
        if unknown:
            raise NATSError(f"architecture: unknown keys {', '.join(unknown[:5])}")
        names = content.get("names", "stages")
        if names not in ("stages", "paths"):
            raise NATSError(f"architecture: names {shown(names)}: expected stages or paths")
        return cls(content.get("layers"), content.get("search") or {}, names == "paths")

    def to_dict(self) -> Dict[str, Any]:
        """The content of an architecture file: plain values, segments as lists."""
        content = {
            "format": FORMAT,
            **({"names": "paths"} if self.paths else {}),
            "layers": {k: OneLine(list(r) for r in v) for k, v in self.layers.items()},
        }
        if self.search:
            content["search"] = dict(self.search)
        return content

    @classmethod
    def from_config(cls, value: Sequence[Any], paths: Optional[bool] = False) -> "Architecture":
        """Read ``MODEL.NATS.ARCHITECTURE``: a list of [layer name, segments].

        Args:
            paths: the names are module paths; in configs so where ``MODEL.NATS.CONVS`` is set. None
                where that is not known: they are, unless all are names of residual networks.
        """
        is_list = isinstance(value, (list, tuple))
        if not is_list or not all(isinstance(v, (list, tuple)) and len(v) == 2 for v in value):
            raise NATSError("MODEL.NATS.ARCHITECTURE must be a list of [layer name, segments]")
        if paths is None:
            paths = not all(str(name).startswith("res") for name, _ in value)
        names = [check_name(name, paths) for name, _ in value]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise NATSError(f"MODEL.NATS.ARCHITECTURE names layers twice: {', '.join(twice[:5])}")
        return cls(dict(value), paths=paths)

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
        if path in shipped_architectures() and not os.path.exists(path):
            path = os.path.join(_SHIPPED, f"{path}.yaml")
        content = read_yaml(path, aliases=False)
        try:
            return cls.from_dict(content)
        except NATSError as error:
            raise NATSError(f"{path}: {error}") from None

    def save(self, path: str) -> None:
        """Write an architecture file. A kill leaves the old or the new one."""
        write_yaml(path, self.to_dict())

    # -- questions ----------------------------------------------------------------------------

    @property
    def stages(self) -> Tuple[str, ...]:
        """The stages that it changes, in order of first mention; none where the names are paths."""
        names = () if self.paths else self.layers
        return tuple(dict.fromkeys(name.split(".")[0] for name in names))

    def restrict(self, stages: Sequence[str]) -> "Architecture":
        """Only the layers of `stages`; or where the names are paths, of these patterns."""
        if self.paths:
            kept = [k for k in self.layers if any(fnmatchcase(k, p) for p in stages)]
        else:
            kept = [k for k in self.layers if k.split(".")[0] in stages]
        return replace(self, layers={k: self.layers[k] for k in kept})

    def transposed(self) -> "Architecture":
        """The same with height and width of each dilation swapped."""
        layers = {k: [(c, d_w, d_h) for c, d_h, d_w in v] for k, v in self.layers.items()}
        return replace(self, layers=layers, search={**self.search, "transposed": True})

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
        """A table: each layer's channels per dilation, and the reach of its 3×3 conv.

        ::

            layer         channels per dilation    largest    mean
            ------------  -----------------------  ---------  -------
            res3.0.conv2  1x1:64, 1x3:32, 3x3:32   7x7        4.0x5.0
        """
        rows = []
        for name in self.layers:
            counts = self.channels_per_dilation(name)
            if self.paths:  # whose kernels the file does not tell
                rows.append((name, _counts_as_text(counts)))
                continue
            extents = np.array([(2 * d_h + 1, 2 * d_w + 1) for d_h, d_w in counts])
            mean = np.average(extents, axis=0, weights=list(counts.values()))
            rows.append(
                (
                    name,
                    _counts_as_text(counts),
                    "{}x{}".format(*extents.max(axis=0)),
                    "{:.1f}x{:.1f}".format(*mean),
                )
            )
        headers = ("layer", "channels per dilation", "largest", "mean")
        widths = (None, 64, None, None)  # break lines: per-channel patterns have many dilations
        columns = 2 if self.paths else 4
        table = tabulate(
            rows, headers[:columns], disable_numparse=True, maxcolwidths=widths[:columns]
        )
        if self.paths:
            return f"{table}\n\nDilations are height x width."
        return (
            f"{table}\n\n"
            "All sizes are height x width. The receptive field of a 3x3 conv on its input is "
            '2d + 1 on a side\n(plain: 3x3). "largest" is the largest of each side, "mean" the '
            "mean over the output channels.\nA stage's own dilation (DC5), which multiplies d, is "
            "not included."
        )


def _counts_as_text(counts: Mapping[Dilation, int]) -> str:
    return ", ".join(f"{d_h}x{d_w}:{channels}" for (d_h, d_w), channels in counts.items())


def shipped_architectures() -> List[str]:
    """The names that :meth:`Architecture.load` takes beside paths."""
    return sorted(name.removesuffix(".yaml") for name in os.listdir(_SHIPPED))


def check_name(name: Any, paths: bool) -> str:
    """Return a layer's name, or raise :class:`NATSError`."""
    # a ModuleDict's keys may be nearly anything
    form, example = (r"[!-~]+", "stem.conv") if paths else (r"res[\w.]+", "res3.0.conv2")
    if not isinstance(name, str) or len(name) > 200 or not re.fullmatch(form, name, re.ASCII):
        raise NATSError(f"architecture: layer name {shown(name)}: expected one like {example!r}")
    return name


def _check_segments(name: str, segments: Any) -> Tuple[Segment, ...]:
    if not isinstance(segments, (list, tuple)) or not segments or len(segments) > MAX_CHANNELS:
        raise NATSError(f"architecture: {name}: expected a list of [channels, d_h, d_w]")
    checked, total = [], 0
    for segment in segments:
        if not isinstance(segment, (list, tuple)) or len(segment) != 3:
            raise NATSError(
                f"architecture: {name}: expected [channels, d_h, d_w], got {shown(segment)}"
            )
        channels = segment[0]
        if type(channels) is not int or not 1 <= channels <= MAX_CHANNELS:
            raise NATSError(f"architecture: {name}: {shown(channels)} is not a number of channels")
        try:
            dilation = check_dilation(list(segment[1:]))
        except NATSError as error:
            raise NATSError(f"architecture: {name}: {error}") from None
        checked.append((channels, *dilation))
        total += channels
    if total > MAX_CHANNELS:
        raise NATSError(f"architecture: {name}: {total} channels, at most {MAX_CHANNELS} allowed")
    return tuple(merged(checked))
