"""Read the architectures of other methods: IC-Conv's patterns and RF-Next's structures.

Both list the dilations of a ResNet's 3×3 convs as JSON, each in its own format. Whether all convs
of a stage are there, with the right number of channels, is checked where the architecture is
applied to a network.
"""

import json
import re
from typing import Any, Dict, List, Mapping, Tuple

from ..errors import NATSError, shown
from ..files import read_bounded
from ..method.architecture import MAX_CHANNELS, Architecture
from ..method.search_space import check_dilation

_BLOCKS = {16: (3, 4, 6, 3), 33: (3, 4, 23, 3)}
"""Number of 3×3 convs → bottleneck blocks in res2, res3, res4, res5: ResNet-50 and ResNet-101."""

_WIDTH = 64
"""Channels of a ResNet's 3×3 convs in res2. Each further stage has twice as many."""


def read_json(path: str) -> Any:
    """Read a JSON file of at most :data:`files.MAX_FILE_BYTES`.

    Raises:
        NATSError: missing, too large, or not JSON; names the file.
    """
    data = read_bounded(path)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NATSError(f"{path}: not readable as JSON: {shown(str(error))}") from None


def from_ic_conv(content: Any, source: str = "", width: int = _WIDTH) -> Architecture:
    """Read IC-Conv's pattern: a list of one dict per 3×3 conv, from res2 on, in block order.

    Each dict maps "(d_h - 1, d_w - 1)" to a number of output channels. Only these counts are
    published. They become segments in the file's own order; IC-Conv builds its conv in the same
    way.

    Args:
        content: the parsed file.
        source: the file's name, recorded in the architecture.
        width: channels of the target network's 3×3 convs in res2. The published files are for 64.
            For another width, each dilation keeps its share of the channels, rounded.

    Raises:
        NATSError: malformed, or not for a ResNet-50 or -101.
    """
    if not isinstance(content, list) or not all(isinstance(c, dict) for c in content):
        raise NATSError("not an IC-Conv pattern: expected a list of {'(0, 1)': channels}")
    if len(content) not in _BLOCKS:
        raise NATSError(
            f"IC-Conv pattern of {len(content)} convs: expected 16 (ResNet-50) or 33 (ResNet-101)"
        )
    depths = _BLOCKS[len(content)]
    names = [f"res{s}.{b}.conv2" for s, blocks in enumerate(depths, 2) for b in range(blocks)]
    layers = {n: _scaled(_ic_conv_segments(n, p), width) for n, p in zip(names, content)}
    return Architecture(layers, {"method": "IC-Conv", **({"source": source} if source else {})})


def _ic_conv_segments(name: str, pattern: Mapping[str, Any]) -> List[Tuple[int, int, int]]:
    segments = []
    for key, channels in pattern.items():
        match = re.fullmatch(r"\s*[(\[]\s*(\d{1,4})\s*,\s*(\d{1,4})\s*[)\]]\s*", key, re.ASCII)
        if not match:
            raise NATSError(f"IC-Conv pattern: {name}: key {shown(key)}: expected one like (0, 1)")
        if type(channels) is not int or not 0 <= channels <= MAX_CHANNELS:
            raise NATSError(
                f"IC-Conv pattern: {name}: {shown(channels)} is not a number of channels"
            )
        if channels:
            segments.append((channels, *(int(less_one) + 1 for less_one in match.groups())))
    if not segments:
        raise NATSError(f"IC-Conv pattern: {name} has no channels")
    return segments


def _scaled(segments: List[Tuple[int, int, int]], width: int) -> List[Tuple[int, int, int]]:
    """The segments for a ResNet of another width: each segment's end is scaled and rounded."""
    scaled, end, scaled_end = [], 0, 0
    for channels, *dilation in segments:
        end += channels
        start, scaled_end = scaled_end, (2 * end * width + _WIDTH) // (2 * _WIDTH)
        if scaled_end > start:
            scaled.append((scaled_end - start, *dilation))
    return scaled


def from_rf_next(
    content: Any, source: str = "", width: int = _WIDTH
) -> Tuple[Architecture, List[str]]:
    """Read RF-Next's structure (written by mmcv's ``RFSearchHook``): one dilation per layer.

    mmdet's ``module.backbone.layer2.0.conv2`` is our ``res3.0.conv2``. The file has no channel
    counts, so the counts are those of a ResNet of `width`.

    Args:
        content: the parsed file: {"structure": {layer name: d, or [d_h, d_w]}, …}.
        source: the file's name, recorded in the architecture.
        width: channels of the 3×3 convs in res2. Each further stage has twice as many.

    Returns:
        The architecture, and the names of dilated layers outside the residual stages, which an
        architecture cannot describe.

    Raises:
        NATSError: malformed, or the backbone is not a ResNet.
    """
    structure = content.get("structure") if isinstance(content, dict) else None
    if not isinstance(structure, dict) or not structure:
        raise NATSError("not an RF-Next structure: expected {'structure': {layer name: dilation}}")
    layers: Dict[str, List[Tuple[int, int, int]]] = {}
    foreign, left_out = [], []
    for name, value in structure.items():
        short = re.sub(r"^(module\.)*", "", name)
        pair = [value, value] if type(value) is int else value
        try:
            dilation = check_dilation(pair)
        except NATSError as error:
            raise NATSError(f"RF-Next structure: {shown(short)}: {error}") from None
        match = re.fullmatch(r"backbone\.layer([1-4])\.(\d{1,3})\.(conv[12])", short, re.ASCII)
        if match:
            stage, block, conv = int(match[1]) + 1, int(match[2]), match[3]
            layers[f"res{stage}.{block}.{conv}"] = [(width * 2 ** (stage - 2), *dilation)]
        elif re.match(r"backbone\.(?!(conv1|stem)\b)", short):
            foreign.append(short)
        elif dilation != (1, 1):
            left_out.append(short)
    if foreign:
        raise NATSError(
            f"RF-Next structure: {shown(foreign[0])} is not a 3x3 conv of a ResNet: only "
            "ResNet and ResNeXt backbones can be imported (names like "
            "backbone.layer2.0.conv2), not Res2Net, HRNet, ConvNeXt or PVT"
        )
    if not layers:
        raise NATSError("RF-Next structure: it names no 3x3 conv of a backbone")
    note = {"method": "RF-Next", **({"source": source} if source else {})}
    return Architecture(dict(sorted(layers.items(), key=_block_order)), note), left_out


def _block_order(item) -> Tuple[str, int, str]:
    stage, block, conv = item[0].split(".")
    return stage, int(block), conv
