#!/usr/bin/env python
"""Make an architecture file of another method's: IC-Conv's patterns and RF-Next's structures.

Both list the dilations of a ResNet's 3x3 convs as JSON, without weights. Whether all convs of a
stage are there, with the right number of channels, is checked where the architecture is applied.
"""

import argparse
import json
import re
import sys
from typing import Any, Dict, List, Mapping, Tuple

from detectron2_nats import Architecture, NATSError

EPILOG = """
examples:
  IC-Conv's pattern for ResNet-50, without res2, which detectors freeze:
    $ python %(prog)s ic-conv ic_resnet50_k9.json --output ic_conv.yaml --stages res3 res4 res5
  the same for a ResNet-50 of half the width:
    $ python %(prog)s ic-conv ic_resnet50_k9.json --output ic_conv.yaml --width 32
  what mmcv's RFSearchHook wrote:
    $ python %(prog)s rf-next local_search_config_step11.json --output rf_next.yaml
"""

BLOCKS = {16: (3, 4, 6, 3), 33: (3, 4, 23, 3)}
"""Number of 3×3 convs → bottleneck blocks in res2, res3, res4, res5: ResNet-50 and ResNet-101."""

WIDTH = 64
"""Channels of a ResNet's 3×3 convs in res2. Each further stage has twice as many."""

Segments = List[Tuple[int, int, int]]
"""(Output channels, d_h, d_w) in channel order."""


def from_ic_conv(content: Any, width: int = WIDTH) -> Dict[str, Segments]:
    """Read IC-Conv's pattern (CVPR 2021): one dict per 3×3 conv, from res2 on, in block order.

    Each dict maps "(d_h - 1, d_w - 1)" to a number of output channels. Only these counts are
    published. They become segments in the file's own order; IC-Conv builds its conv in the same
    way.

    Args:
        content: the parsed file.
        width: channels of the target network's 3×3 convs in res2. The published files are for 64.
            For another width, each dilation keeps its share of the channels, rounded.

    Returns:
        Layer name → segments.

    Raises:
        NATSError: malformed, or not for a ResNet-50 or -101.
    """
    if not isinstance(content, list) or not all(isinstance(c, dict) for c in content):
        raise NATSError("not an IC-Conv pattern: expected a list of {'(0, 1)': channels}")
    if len(content) not in BLOCKS:
        raise NATSError(
            f"IC-Conv pattern of {len(content)} convs: expected 16 (ResNet-50) or 33 (ResNet-101)"
        )
    depths = BLOCKS[len(content)]
    names = [f"res{s}.{b}.conv2" for s, blocks in enumerate(depths, 2) for b in range(blocks)]
    return {n: _scaled(_ic_conv_segments(n, p), width) for n, p in zip(names, content)}


def _ic_conv_segments(name: str, pattern: Mapping[str, Any]) -> Segments:
    segments = []
    for key, channels in pattern.items():
        match = re.fullmatch(r"\s*[(\[]\s*(\d{1,4})\s*,\s*(\d{1,4})\s*[)\]]\s*", key, re.ASCII)
        if not match:
            raise NATSError(f"IC-Conv pattern: {name}: key {key!r:.80}: expected one like (0, 1)")
        if type(channels) is not int or channels < 0:
            raise NATSError(f"IC-Conv pattern: {name}: {channels!r:.80} is no number of channels")
        if channels:
            segments.append((channels, int(match[1]) + 1, int(match[2]) + 1))
    if not segments:
        raise NATSError(f"IC-Conv pattern: {name} has no channels")
    return segments


def _scaled(segments: Segments, width: int) -> Segments:
    """The segments for a ResNet of another width: each segment's end is scaled and rounded."""
    scaled, end, scaled_end = [], 0, 0
    for channels, d_h, d_w in segments:
        end += channels
        start, scaled_end = scaled_end, (2 * end * width + WIDTH) // (2 * WIDTH)
        if scaled_end > start:
            scaled.append((scaled_end - start, d_h, d_w))
    return scaled


def from_rf_next(content: Any, width: int = WIDTH) -> Dict[str, Segments]:
    """Read RF-Next's structure (TPAMI 2022), as mmcv's ``RFSearchHook`` writes it.

    It has one dilation per layer: mmdet's ``module.backbone.layer2.0.conv2`` is our
    ``res3.0.conv2``. Dilated layers outside the residual stages, which an architecture cannot
    describe, are left out, with a line that names them.

    Args:
        content: the parsed file: {"structure": {layer name: d, or [d_h, d_w]}, …}.
        width: channels of the 3×3 convs in res2, which the file does not tell.

    Returns:
        Layer name → segments.

    Raises:
        NATSError: malformed, or the backbone is not a ResNet.
    """
    structure = content.get("structure") if isinstance(content, dict) else None
    if not isinstance(structure, dict) or not structure:
        raise NATSError("not an RF-Next structure: expected {'structure': {layer name: dilation}}")
    layers: Dict[str, Segments] = {}
    for name, value in structure.items():
        short = re.sub(r"^(module\.)*", "", name)
        dilation = value if isinstance(value, list) else [value, value]
        match = re.fullmatch(r"backbone\.layer([1-4])\.(\d{1,3}\.conv[12])", short, re.ASCII)
        if match:
            channels = width * 2 ** (int(match[1]) - 1)
            layers[f"res{int(match[1]) + 1}.{match[2]}"] = [(channels, *dilation)]
        elif re.match(r"backbone\.(?!(conv1|stem)\b)", short):
            raise NATSError(
                f"RF-Next structure: {short!r:.80} is not a 3x3 conv of a ResNet: only ResNet and "
                "ResNeXt backbones can be imported (names like backbone.layer2.0.conv2)"
            )
        elif dilation != [1, 1]:
            print(f"left out {short!r:.80}: it is outside the residual stages")
    if not layers:
        raise NATSError("RF-Next structure: it names no 3x3 conv of a backbone")
    return layers


METHODS = {"ic-conv": ("IC-Conv", from_ic_conv), "rf-next": ("RF-Next", from_rf_next)}


def main(args: argparse.Namespace) -> None:
    method, read = METHODS[args.method]
    try:
        with open(args.file, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise NATSError(f"{args.file}: cannot be read: {error.strerror}") from None
    except (RecursionError, ValueError) as error:
        raise NATSError(f"{args.file}: not readable as JSON: {error}") from None
    layers = read(content, args.width)
    layers = {name: v for name, v in layers.items() if name.split(".")[0] in args.stages}
    Architecture(layers, {"method": method, "source": args.file}).save(args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("file", metavar="FILE", help="the method's JSON file")
    parser.add_argument("--output", required=True, help="architecture file to write")
    parser.add_argument(
        "--width",
        type=int,
        default=WIDTH,
        help="channels of res2's 3x3 convs; 128 in ResNeXt-101-32x4d (%(default)s)",
    )
    stages = ["res2", "res3", "res4", "res5"]
    parser.add_argument(
        "--stages", nargs="+", choices=stages, default=stages, help="leave the others plain"
    )
    try:
        main(parser.parse_args())
    except (NATSError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
