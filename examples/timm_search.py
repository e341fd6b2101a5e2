#!/usr/bin/env python
"""Search a ResNet of timm under a loss of your own: here, which classes an image shows.

Ends with a state dict that timm's plain model takes as it is, and the architecture.
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection
from torchvision.transforms.functional import pil_to_tensor, resize

import detectron2_nats as nats
from detectron2_nats.toy.sets import ensure_embedded_dataset

EPILOG = """
example:
  $ python examples/timm_search.py --output output/timm
writes architecture.yaml and model.pth.
"""


def batches(name: str, size: int):
    """Endless (images, which of five classes they show) of the embedded shapes."""

    def transforms(image, annotations):
        shown = torch.eye(5)[[a["category_id"] - 1 for a in annotations]]
        return resize(pil_to_tensor(image), [size, size]) / 255, shown.sum(dim=0).clamp(max=1)

    folder = ensure_embedded_dataset()
    annotations = f"{folder}/instances_{name}.json"
    data = CocoDetection(f"{folder}/{name}", annotations, None, None, transforms)
    while True:
        yield from DataLoader(data, 8, shuffle=True)


def take_step(model, optimizer, batch) -> None:
    images, shown = batch
    optimizer.zero_grad()
    F.binary_cross_entropy_with_logits(model(images), shown).backward()
    optimizer.step()


def main(args: argparse.Namespace) -> None:
    plain = timm.create_model(args.model, num_classes=5)  # pretrained=True would download weights
    supernet = nats.to_supernet(plain, nats.SearchSpace("A", num_groups=8))
    alphas = nats.alpha_parameters(supernet)
    for alpha in alphas:
        alpha.requires_grad_(False)  # alpha_training() switches it on
    weights = [p for p in supernet.parameters() if p.requires_grad]
    sgd, adam = torch.optim.SGD(weights, lr=0.01, momentum=0.9), torch.optim.Adam(alphas, lr=0.01)
    train, calibration = batches("train", args.size), batches("calibration", args.size)
    for iteration in range(args.iterations):
        take_step(supernet, sgd, next(train))
        if iteration >= 0.4 * args.iterations:
            with nats.alpha_training(supernet):
                take_step(supernet, adam, next(calibration))
    architecture = nats.Architecture.decode(supernet, "voted")
    architecture.save(f"{args.output}/architecture.yaml")
    torch.save(nats.frozen_state_dict(supernet, architecture), f"{args.output}/model.pth")

    # what another program does with the two files
    frozen = timm.create_model(args.model, num_classes=5)
    nats.apply_architecture(frozen, f"{args.output}/architecture.yaml")
    frozen.load_state_dict(torch.load(f"{args.output}/model.pth", weights_only=True))
    images, shown = next(batches("val", args.size))
    with torch.no_grad():
        right = ((frozen.eval()(images) > 0) == (shown > 0)).double().mean()
    print(f"wrote {args.output}/model.pth ({right:.0%} right on {len(images)} images)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--model", default="resnet18", help="of timm, with residual stages")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    main(parser.parse_args())
