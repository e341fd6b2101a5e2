"""What is searched: the genotypes of each conv, and its channel groups (section 3.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Mapping, Optional, Tuple, Union

from ..errors import NATSError, shown

Dilation = Tuple[int, int]
"""(d_h, d_w): along height and width. A *genotype* is a dilation that a group may choose."""

MAX_DILATION = 64
"""Larger dilations reach past any feature map and are refused as typing errors."""

_SQUARE_3 = ((1, 1), (2, 2), (3, 3))
_SQUARE_5 = _SQUARE_3 + ((4, 4), (5, 5))
_LONG_3 = ((1, 3), (3, 1))
_LONG_5 = _LONG_3 + ((1, 5), (5, 1))

PAPER_SETS: Mapping[str, Mapping[str, Tuple[Dilation, ...]]] = {
    name: {"res2": early, "res3": early, "res4": early, "res5": res5}
    for name, early, res5 in (
        ("A", ((1, 1), (3, 3)), ((1, 1), (3, 3), (5, 5))),
        ("B", _SQUARE_3, _SQUARE_5),
        ("C", _SQUARE_3 + _LONG_3, _SQUARE_5 + _LONG_5),
    )
}
"""The paper's genotype sets. The paper does not search res2; here it has the set of res3."""


def check_dilation(value: Any) -> Dilation:
    """Return `value` as a pair of ints, or raise :class:`NATSError`."""
    is_pair = _is_list(value) and len(value) == 2
    if not is_pair or not all(type(d) is int and 1 <= d <= MAX_DILATION for d in value):
        raise NATSError(
            f"malformed dilation {shown(value)}: expected a pair (d_h, d_w) of whole numbers "
            f"from 1 to {MAX_DILATION}"
        )
    return value[0], value[1]


def _is_list(value: Any) -> bool:
    """True for OmegaConf's lists too, which LazyConfig passes."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


STAGES = ("res3", "res4", "res5")
"""The stages that the paper searches."""


@dataclass(frozen=True, init=False)
class SearchSpace:
    """The searched convs, their genotypes, and the number of channel groups.

    Searched are the 3×3 convs of a residual network's stages, as in the paper, or with `convs` any
    convs of any network.

    Args:
        space: "A", "B" or "C" (the paper's sets), or one list of dilation pairs per stage or
            pattern. Each list must begin with (1, 1), the plain conv. By name, every pattern has
            the set of res5.
        stages: names of the searched stages, "res2" to "res5"; by default :data:`STAGES`.
        convs: instead of `stages`, patterns of module paths ("neck.*", "blocks.?.*.conv_dw"; as in
            `fnmatch`). Searched are the convs that match and can be (:mod:`.convs`); a conv belongs
            to the first pattern that it matches.
        num_groups: N, channel groups per conv; 1 is path-level search. The default is 16, unless
            `channels_per_group` is given.
        channels_per_group: output channels per group, instead of `num_groups`.
        share_weights: use one weight for all genotypes instead of one replica per genotype.
        sample: draw one genotype per group at each step instead of mixing them; one weight for all.

    Attributes:
        genotypes: stage or pattern → its genotypes.

    Raises:
        NATSError: unknown set, malformed dilation, or two arguments that exclude each other.
    """

    stages: Tuple[str, ...]
    convs: Tuple[str, ...]
    genotypes: Mapping[str, Tuple[Dilation, ...]]
    num_groups: Optional[int]
    channels_per_group: Optional[int]
    share_weights: bool
    sample: bool

    def __init__(
        self,
        space: Union[str, Sequence[Sequence[Sequence[int]]]] = "C",
        *,
        stages: Optional[Sequence[str]] = None,
        convs: Sequence[str] = (),
        num_groups: Optional[int] = None,
        channels_per_group: Optional[int] = None,
        share_weights: bool = False,
        sample: bool = False,
    ):
        if convs != () and stages is not None:
            raise NATSError(f"both STAGES {shown(stages)} and CONVS {shown(convs)}: name one")
        if num_groups is not None and channels_per_group is not None:
            raise NATSError(
                f"both NUM_GROUPS ({num_groups}) and CHANNELS_PER_GROUP ({channels_per_group}) are "
                "set: keep one of them and set the other to 0"
            )
        if num_groups is None and channels_per_group is None:
            num_groups = 16
        for key, value in (("NUM_GROUPS", num_groups), ("CHANNELS_PER_GROUP", channels_per_group)):
            if value is not None and (type(value) is not int or value < 1):
                raise NATSError(f"{key} {shown(value)}: expected a whole number of at least 1")
        stages = () if convs != () else _checked_stages(STAGES if stages is None else stages)
        convs = () if convs == () else checked_patterns(convs)
        # the dataclass is frozen: set its values here, once
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "convs", convs)
        object.__setattr__(self, "genotypes", _genotypes(space, stages, convs))
        object.__setattr__(self, "num_groups", num_groups)
        object.__setattr__(self, "channels_per_group", channels_per_group)
        object.__setattr__(self, "share_weights", bool(share_weights or sample))
        object.__setattr__(self, "sample", bool(sample))

    def genotypes_of(self, layer: str, kernel: Tuple[int, int] = (3, 3)) -> Tuple[Dilation, ...]:
        """The genotypes of a conv. Along a side of its `kernel` that is 1, all dilations are one.

        Args:
            layer: its name in the architecture.
        """
        if self.convs:
            key = next(pattern for pattern in self.convs if fnmatchcase(layer, pattern))
        else:
            key = layer.split(".")[0]
        told_apart = [
            tuple(d if k > 1 else 1 for d, k in zip(dilation, kernel))
            for dilation in self.genotypes[key]
        ]
        return tuple(dict.fromkeys(told_apart))

    def groups_of(self, layer: str, channels: int, conv_groups: int = 1) -> int:
        """N for a conv of `channels` output channels in `conv_groups` conv groups.

        Of `convs`, whose widths differ, each has the most groups that fit it: at most `num_groups`,
        or at least `channels_per_group` channels in each. In depthwise convs and ResNeXt's, a
        channel group holds whole conv groups.

        Raises:
            NATSError: of `stages`, the groups do not divide the channels, or split a conv group.
        """
        units = conv_groups if conv_groups > 1 else channels  # a group holds whole ones
        if self.convs:
            most = self.num_groups or channels // self.channels_per_group
            return max(n for n in range(1, units + 1) if units % n == 0 and n <= max(most, 1))
        if self.channels_per_group is not None:
            key, value = "CHANNELS_PER_GROUP", self.channels_per_group
            num_groups, rest = divmod(channels, value)
        else:
            key, value = "NUM_GROUPS", self.num_groups
            num_groups, rest = value, channels % value
        if rest:
            raise NATSError(
                f"{key} {value} does not divide the {channels} channels of {layer}: "
                f"choose a divisor of {channels}"
            )
        if units % num_groups:
            raise NATSError(
                f"{key} {value} cuts the conv groups of {layer}: it has {conv_groups} conv groups "
                f"of {channels // conv_groups} channels, and a channel group must not split one"
            )
        return num_groups


def _checked_stages(stages: Any) -> Tuple[str, ...]:
    known = list(PAPER_SETS["C"])
    is_list = _is_list(stages) and all(stage in known for stage in stages)
    if not stages or not is_list or len(set(stages)) < len(stages):
        raise NATSError(f"STAGES {shown(stages)}: expected one or more of {known}, each once")
    return tuple(stages)


def checked_patterns(convs: Any) -> Tuple[str, ...]:
    """One or more different patterns of module paths, or :class:`NATSError`."""
    is_list = _is_list(convs) and all(isinstance(c, str) and c for c in convs)
    if not is_list or not convs or len(set(convs)) < len(convs):
        raise NATSError(
            f"CONVS {shown(convs)}: expected a list of patterns of module paths, such as "
            "['neck.*'], each once"
        )
    return tuple(convs)


def _genotypes(
    space: Any, stages: Tuple[str, ...], convs: Tuple[str, ...]
) -> Mapping[str, Tuple[Dilation, ...]]:
    keys, kind = (convs, "pattern") if convs else (stages, "stage")
    if isinstance(space, str):
        if space not in PAPER_SETS:
            raise NATSError(
                f"unknown SPACE {shown(space)}: expected one of {', '.join(PAPER_SETS)}, or a "
                f"list of dilation pairs for each {kind}"
            )
        return {key: PAPER_SETS[space]["res5" if convs else key] for key in keys}
    if not _is_list(space) or len(space) != len(keys):
        raise NATSError(
            f"SPACE {shown(space)}: expected one list of dilation pairs for each of {list(keys)}"
        )
    genotypes = {}
    for key, pairs in zip(keys, space):
        if not _is_list(pairs) or not pairs:
            raise NATSError(
                f"SPACE of {key}: expected a list of dilation pairs, got {shown(pairs)}"
            )
        genotypes[key] = tuple(check_dilation(pair) for pair in pairs)
        if genotypes[key][0] != (1, 1) or len(set(genotypes[key])) < len(pairs):
            raise NATSError(
                f"SPACE of {key}: {shown(pairs)} must begin with (1, 1), the plain conv, and "
                "name each dilation once"
            )
    return genotypes
