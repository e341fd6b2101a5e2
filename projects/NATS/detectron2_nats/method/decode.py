"""From α to dilations: which genotype each channel group gets (section 3.3)."""

from typing import Iterable, List, Sequence, Tuple

import numpy as np
import torch

from ..errors import NATSError, shown
from .search_space import Dilation

DECODE_ORDERS = ("paper", "voted")

Segment = Tuple[int, int, int]
"""A segment, (output channels, d_h, d_w): consecutive output channels of one dilation."""


def merged(segments: Iterable[Sequence[int]]) -> List[Segment]:
    """Neighbours of equal dilation joined, so that equal architectures compare equal."""
    joined: List[Segment] = []
    for channels, d_h, d_w in segments:
        if joined and joined[-1][1:] == (d_h, d_w):
            channels += joined.pop()[0]
        joined.append((channels, d_h, d_w))
    return joined


def votes(alpha: np.ndarray, margin: float = 0.0, at_most: int = 0) -> np.ndarray:
    """The genotype index that each group votes for: (N, G) → (N,). A tie goes to the first.

    Args:
        margin: a group leaves genotype 0, the plain conv, only if the softmax(α) of its best
            genotype exceeds that of genotype 0 by more than this. 0 is the paper's argmax.
        at_most: so many genotypes stand for election in the conv: those with the largest sum of
            softmax(α) over the groups. 0: all, as in the paper. A margin holds where genotype 0
            is among them.
    """
    alpha = np.asarray(alpha)
    if not np.isfinite(alpha).all():
        raise NATSError("alpha has non-finite values and cannot be decoded")
    shares = torch.as_tensor(alpha).double().softmax(dim=1).numpy()
    standing = np.ones(alpha.shape[1], dtype=bool)
    if at_most:
        standing[np.argsort(-shares.sum(axis=0), kind="stable")[at_most:]] = False
    voted = np.where(standing, alpha, -np.inf).argmax(axis=1)
    if margin and standing[0]:
        best = np.take_along_axis(shares, voted[:, None], axis=1)[:, 0]
        voted[best - shares[:, 0] <= margin] = 0
    return voted


def intensities(alpha: np.ndarray) -> np.ndarray:
    """The share of the groups that vote for each genotype, I^g: (N, G) → (G,). Sums to 1."""
    return np.bincount(votes(alpha), minlength=np.shape(alpha)[1]) / np.shape(alpha)[0]


def decode_alpha(
    alpha: np.ndarray,
    genotypes: Sequence[Dilation],
    channels: int,
    order: str = "paper",
    margin: float = 0.0,
    at_most: int = 0,
) -> Tuple[Segment, ...]:
    """Decode one conv's α (N, G) into segments of its `channels` output channels.

    Args:
        order: "paper": only the number of votes per genotype counts, and the channels get their
            dilations in genotype order. "voted": each group keeps its own channels and gets the
            dilation that it voted for.
        margin, at_most: see :func:`votes`.
    """
    if order not in DECODE_ORDERS:
        raise NATSError(f"unknown DECODE_ORDER {order!r}: expected one of {list(DECODE_ORDERS)}")
    if not 0 <= margin < 1:
        raise NATSError(
            f"DECODE_MARGIN {margin}: expected a share of softmax(α), at least 0 and below 1"
        )
    if type(at_most) is not int or at_most < 0:
        raise NATSError(f"DECODE_AT_MOST {shown(at_most)}: expected a number of dilations, or 0")
    voted = votes(alpha, margin, at_most)
    if order == "paper":
        voted = np.sort(voted)
    per_group = channels // len(voted)
    return tuple(merged((per_group, *genotypes[g]) for g in voted))
