#!/usr/bin/env python
"""Search torchvision's Faster R-CNN in a plain PyTorch loop: no Detectron2, config or trainer.

Ends with a state dict of the plain detector's keys, and the architecture that goes with it.
"""

import argparse

import torch
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.transforms.functional import pil_to_tensor

import detectron2_nats as nats
from detectron2_nats.toy.sets import ensure_embedded_dataset

EPILOG = """
example:
  $ python examples/torchvision_search.py --output output/torchvision
writes architecture.yaml and detector.pth.
"""


def split(name: str) -> CocoDetection:
    """Of the embedded shapes, in COCO's format; your own data are two other paths."""

    def transforms(image, annotations):
        boxes = torch.tensor([a["bbox"] for a in annotations]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
        return pil_to_tensor(image) / 255, {"boxes": boxes, "labels": labels}

    folder = ensure_embedded_dataset()
    return CocoDetection(
        f"{folder}/{name}", f"{folder}/instances_{name}.json", None, None, transforms
    )


def batches(data: CocoDetection):
    while True:
        yield from DataLoader(data, 2, shuffle=True, collate_fn=lambda pairs: tuple(zip(*pairs)))


def plain_detector(size: int):
    sizes = {"min_size": size, "max_size": 2 * size}  # weights "DEFAULT" would be downloaded
    return fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=6, **sizes)


def take_step(model, optimizer, batch) -> None:
    optimizer.zero_grad()
    sum(model(*batch).values()).backward()
    optimizer.step()


def search(supernet, iterations: int) -> None:
    """SGD on the weights, then Adam on α, on images that the weights are not trained on."""
    alphas = nats.alpha_parameters(supernet)
    for alpha in alphas:
        alpha.requires_grad_(False)  # alpha_training() switches it on
    weights = [p for p in supernet.train().parameters() if p.requires_grad]
    sgd, adam = torch.optim.SGD(weights, lr=0.005, momentum=0.9), torch.optim.Adam(alphas, lr=0.01)
    train, calibration = batches(split("train")), batches(split("calibration"))
    for iteration in range(iterations):
        take_step(supernet, sgd, next(train))
        if iteration >= 0.4 * iterations:
            with nats.alpha_training(supernet):
                take_step(supernet, adam, next(calibration))


@torch.no_grad()
def average_precision(detector, data: CocoDetection, images: int) -> float:
    results, ids = [], data.ids[:images]
    for index, image_id in enumerate(ids):
        found = detector([data[index][0]])[0]
        found["boxes"][:, 2:] -= found["boxes"][:, :2]
        rows = zip(*(found[key].tolist() for key in ("boxes", "labels", "scores")))
        results += [dict(image_id=image_id, bbox=b, category_id=c, score=s) for b, c, s in rows]
    if not results:
        return 0.0
    evaluation = COCOeval(data.coco, data.coco.loadRes(results), "bbox")
    evaluation.params.imgIds = ids
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return 100 * evaluation.stats[0]


def main(args: argparse.Namespace) -> None:
    supernet = nats.to_supernet(plain_detector(args.size), nats.SearchSpace("A", num_groups=8))
    search(supernet, args.iterations)
    architecture = nats.Architecture.decode(supernet, "voted")
    architecture.save(f"{args.output}/architecture.yaml")
    torch.save(nats.frozen_state_dict(supernet, architecture), f"{args.output}/detector.pth")

    # what another program does with the two files
    frozen = nats.apply_architecture(plain_detector(args.size), f"{args.output}/architecture.yaml")
    frozen.load_state_dict(torch.load(f"{args.output}/detector.pth", weights_only=True))
    precision = average_precision(frozen.eval(), split("val"), args.images)
    print(f"wrote {args.output}/detector.pth (AP {precision:.1f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--size", type=int, default=128, help="shorter side of the images")
    parser.add_argument("--images", type=int, default=100, help="to evaluate on")
    main(parser.parse_args())
