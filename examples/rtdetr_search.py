#!/usr/bin/env python
"""Search RT-DETR of transformers, backbone and neck, in a plain PyTorch loop.

Ends with a state dict that the plain detector takes as it is, and the architecture.
"""

import argparse

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection
from torchvision.transforms.functional import pil_to_tensor, resize
from transformers import RTDetrConfig, RTDetrForObjectDetection

import detectron2_nats as nats
from detectron2_nats.toy.sets import ensure_embedded_dataset

EPILOG = """
example:
  $ python examples/rtdetr_search.py --output output/rtdetr
writes architecture.yaml and detector.pth.
"""

# the second conv of each block of the ResNet, and the 3×3 convs of the neck
CONVS = ["model.backbone.*.layers.?.layer.1.convolution", "model.encoder.pan_blocks.*"]


def plain_detector() -> RTDetrForObjectDetection:
    # Yours would be: RTDetrForObjectDetection.from_pretrained("PekingU/rtdetr_r18vd"). This one has
    # weights drawn at random, so that nothing is downloaded, and is small.
    config = RTDetrConfig(num_labels=5, num_queries=30, decoder_layers=2)
    config.backbone_config.depths = [1, 1, 1, 1]
    return RTDetrForObjectDetection(config)


def batches(name: str, size: int):
    """Endless batches of the embedded shapes, in COCO's format; your own data are two paths."""

    def transforms(image, annotations):
        boxes = torch.tensor([a["bbox"] for a in annotations]).reshape(-1, 4)
        boxes[:, :2] += boxes[:, 2:] / 2  # centre, width, height
        boxes /= torch.tensor([image.width, image.height] * 2)
        classes = torch.tensor([a["category_id"] - 1 for a in annotations], dtype=torch.int64)
        pixels = resize(pil_to_tensor(image), [size, size]) / 255
        return pixels, {"class_labels": classes, "boxes": boxes}

    folder = ensure_embedded_dataset()
    files = f"{folder}/{name}", f"{folder}/instances_{name}.json"
    data = CocoDetection(*files, transforms=transforms)
    while True:
        yield from DataLoader(data, 4, shuffle=True, collate_fn=lambda pairs: tuple(zip(*pairs)))


def loss_of(model, batch) -> torch.Tensor:
    images, labels = batch
    return model(pixel_values=torch.stack(images), labels=list(labels)).loss


def take_step(model, optimizer, batch) -> None:
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


def main(args: argparse.Namespace) -> None:
    space = nats.SearchSpace("A", convs=CONVS, num_groups=8, sample=True)
    supernet = nats.to_supernet(plain_detector(), space).train()
    alphas = nats.alpha_parameters(supernet)
    for alpha in alphas:
        alpha.requires_grad_(False)  # alpha_training() switches it on
    weights = [p for p in supernet.parameters() if p.requires_grad]
    adamw, adam = torch.optim.AdamW(weights, lr=1e-4), torch.optim.Adam(alphas, lr=0.01)
    train, calibration = batches("train", args.size), batches("calibration", args.size)
    for iteration in range(args.iterations):
        take_step(supernet, adamw, next(train))
        if iteration >= 0.4 * args.iterations:
            with nats.alpha_training(supernet):
                take_step(supernet, adam, next(calibration))
    architecture = nats.Architecture.decode(supernet, "voted")
    architecture.save(f"{args.output}/architecture.yaml")
    torch.save(nats.frozen_state_dict(supernet, architecture), f"{args.output}/detector.pth")

    # what another program does with the two files
    frozen = nats.apply_architecture(plain_detector(), f"{args.output}/architecture.yaml").eval()
    frozen.load_state_dict(torch.load(f"{args.output}/detector.pth", weights_only=True))
    with torch.no_grad():
        loss = float(loss_of(frozen, next(batches("val", args.size))))
    print(f"wrote {args.output}/detector.pth (loss {loss:.2f} on four images)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    main(parser.parse_args())
