"""What is searched: the convs, their genotypes, and their channel groups (section 3.2)."""

import re
from collections.abc import Sequence
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

CONVS = ("res3.*", "res4.*", "res5.*")
"""Patterns of the convs that the paper searches. Names: :mod:`.names`."""


def stage_of(name: str) -> str:
    """The stage of a residual network's conv: "res3.0.conv2" → "res3"; "" of others' names."""
    match = re.fullmatch(r"(res[2-5])\.\d+\.conv[12]", name, re.ASCII)
    return match[1] if match else ""


def first_match(name: str, patterns: Sequence[str]) -> str:
    """The pattern that a name belongs to; "" if none matches."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), "")


def check_dilation(value: Any) -> Dilation:
    """Return `value` as a pair of ints, or raise :class:`NATSError`."""
    is_pair = _is_list(value) and len(value) == 2
    if not is_pair or not all(type(d) is int and 1 <= d <= MAX_DILATION for d in value):
        raise NATSError(
            f"malformed dilation {shown(value)}: expected a pair (d_h, d_w) of whole numbers "
            f"from 1 to {MAX_DILATION}"
        )
    return value[0], value[1]


def check_patterns(convs: Any) -> Tuple[str, ...]:
    """Return one or more different patterns of names, or raise :class:`NATSError`."""
    is_list = _is_list(convs) and all(isinstance(pattern, str) and pattern for pattern in convs)
    if not is_list or not convs or len(set(convs)) < len(convs):
        raise NATSError(
            f"CONVS {shown(convs)}: expected a list of patterns of names, such as ['res3.*', "
            "'fpn_output*'], each once"
        )
    return tuple(convs)


def _is_list(value: Any) -> bool:
    """True for OmegaConf's lists too, which LazyConfig passes."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


class SearchSpace:
    """The searched convs, their genotypes, and the number of channel groups.

    Args:
        space: "A", "B" or "C" (the paper's sets), or one list of dilation pairs per pattern. Each
            list must begin with (1, 1), the plain conv. By name, patterns of res2, res3 and res4
            have the set of their stage, all others that of res5.
        convs: patterns of names (:mod:`.names`), as in `fnmatch`; by default the paper's stages.
            Searched are the convs that match and can be; a conv belongs to the first pattern that
            it matches.
        stages: ["res3"] stands for `convs` ["res3.*"].
        num_groups: N, channel groups per conv; 1 is path-level search. The default is 16, unless
            `channels_per_group` is given.
        channels_per_group: output channels per group, instead of `num_groups`.
        share_weights: use one weight for all genotypes instead of one replica per genotype.
        sample: draw one genotype per group at each step instead of mixing them; one weight for all.

    Attributes:
        genotypes: pattern → its genotypes.

    Raises:
        NATSError: unknown set, malformed dilation, or two arguments that exclude each other.
    """

    def __init__(
        self,
        space: Union[str, Sequence[Sequence[Sequence[int]]]] = "C",
        convs: Sequence[str] = CONVS,
        *,
        stages: Sequence[str] = (),
        num_groups: Optional[int] = None,
        channels_per_group: Optional[int] = None,
        share_weights: bool = False,
        sample: bool = False,
    ):
        if stages:
            convs = [f"{stage}.*" for stage in stages]
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
        self.convs = check_patterns(convs)
        self.genotypes: Mapping[str, Tuple[Dilation, ...]] = _genotypes(space, self.convs)
        self.num_groups, self.channels_per_group = num_groups, channels_per_group
        self.share_weights, self.sample = bool(share_weights or sample), bool(sample)

    def genotypes_of(self, name: str, kernel: Tuple[int, int] = (3, 3)) -> Tuple[Dilation, ...]:
        """The genotypes of a conv. On a side of its `kernel` of 1 all dilations are one."""
        told_apart = [
            tuple(d if k > 1 else 1 for d, k in zip(dilation, kernel))
            for dilation in self.genotypes[first_match(name, self.convs)]
        ]
        return tuple(dict.fromkeys(told_apart))

    def groups_of(self, name: str, channels: int, conv_groups: int = 1) -> int:
        """N for a conv of `channels` output channels in `conv_groups` conv groups.

        In depthwise convs and ResNeXt's, a channel group holds whole conv groups. Convs of a
        residual network have what was asked for. Others, whose widths differ, have the most groups
        that fit: at most `num_groups`, or at least `channels_per_group` channels in each.

        Raises:
            NATSError: of a residual network, the groups do not divide the channels, or split a conv
                group.
        """
        units = conv_groups if conv_groups > 1 else channels  # a group holds whole ones
        if not stage_of(name):
            most = self.num_groups or channels // self.channels_per_group
            return max(n for n in range(1, units + 1) if units % n == 0 and n <= max(most, 1))
        num_groups = self.num_groups or max(1, channels // self.channels_per_group)
        per_group = self.channels_per_group or channels // num_groups
        if per_group * num_groups != channels or units % num_groups:
            key = "NUM_GROUPS" if self.num_groups else "CHANNELS_PER_GROUP"
            whole = f" that keeps its {conv_groups} conv groups whole" if conv_groups > 1 else ""
            raise NATSError(
                f"{key} {self.num_groups or self.channels_per_group} does not fit {name}: choose a "
                f"divisor of its {channels} channels{whole}"
            )
        return num_groups


def _genotypes(space: Any, convs: Tuple[str, ...]) -> Mapping[str, Tuple[Dilation, ...]]:
    if isinstance(space, str):
        if space not in PAPER_SETS:
            raise NATSError(
                f"unknown SPACE {shown(space)}: expected one of {', '.join(PAPER_SETS)}, or a "
                "list of dilation pairs for each pattern of CONVS"
            )
        sets = PAPER_SETS[space]
        return {pattern: sets.get(pattern.split(".")[0], sets["res5"]) for pattern in convs}
    if not _is_list(space) or len(space) != len(convs):
        raise NATSError(
            f"SPACE {shown(space)}: expected one list of dilation pairs for each of {list(convs)}"
        )
    genotypes = {}
    for pattern, pairs in zip(convs, space):
        of_pattern = tuple(map(check_dilation, pairs)) if _is_list(pairs) else ()
        if of_pattern[:1] != ((1, 1),) or len(set(of_pattern)) < len(of_pattern):
            raise NATSError(
                f"SPACE of {pattern}: {shown(pairs)}: expected a list of dilation pairs that "
                "begins with (1, 1), the plain conv, and names each once"
            )
        genotypes[pattern] = of_pattern
    return genotypes
