#!/usr/bin/env python
"""Search a backbone of timm, of any kind, in torchvision's Faster R-CNN.

Ends with a state dict that the plain detector takes as it is, and the architecture.
"""

import argparse

import timm
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision_search import average_precision, search, split

import detectron2_nats as nats

EPILOG = """
example:
  $ python examples/timm_detector_search.py --output output/timm_detector
  $ python examples/timm_detector_search.py --model convnext_atto --convs 'body.stages_*.conv_dw' \\
        --output output/convnext
writes architecture.yaml and detector.pth.
"""


class Backbone(nn.Module):
    """timm's feature maps of strides 8, 16 and 32, under a feature pyramid."""

    out_channels = 64

    def __init__(self, name: str):
        super().__init__()
        # pretrained=True would download weights
        self.body = timm.create_model(name, features_only=True, out_indices=(-3, -2, -1))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, images):
        return self.fpn({str(i): maps for i, maps in enumerate(self.body(images))})


def plain_detector(name: str, size: int) -> FasterRCNN:
    anchors = AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
    return FasterRCNN(
        Backbone(name),
        num_classes=6,
        min_size=size,
        max_size=2 * size,
        rpn_anchor_generator=anchors,
    )


def main(args: argparse.Namespace) -> None:
    space = nats.SearchSpace("A", convs=args.convs, num_groups=8, sample=True)
    detector = plain_detector(args.model, args.size)
    nats.to_supernet(detector.backbone, space)
    search(detector, args.iterations)
    architecture = nats.Architecture.decode(detector.backbone, "voted")
    architecture.save(f"{args.output}/architecture.yaml")
    torch.save(nats.frozen_state_dict(detector, architecture), f"{args.output}/detector.pth")

    # what another program does with the two files; names are paths in what was searched
    frozen = plain_detector(args.model, args.size)
    nats.apply_architecture(frozen.backbone, f"{args.output}/architecture.yaml")
    frozen.load_state_dict(torch.load(f"{args.output}/detector.pth", weights_only=True))
    precision = average_precision(frozen.eval(), split("val"), args.images)
    print(f"wrote {args.output}/detector.pth (AP {precision:.1f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--model", default="regnetx_002", help="of timm")
    parser.add_argument("--convs", nargs="+", default=["body.*", "fpn.layer_blocks.*"])
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--size", type=int, default=128, help="shorter side of the images")
    parser.add_argument("--images", type=int, default=100, help="to evaluate on")
    main(parser.parse_args())
