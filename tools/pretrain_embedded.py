#!/usr/bin/env python
"""Train the tiny classifier that is embedded in the package.

A narrow ResNet-50 (stem 32, width per group 16, 1.5 M parameters) learns to classify the object in
drawn crops. They look like the embedded data set but use other seeds. This takes a few minutes on
two CPU cores.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2_nats.toy import scenes, sets

EPILOG = """
example:
  $ python tools/pretrain_embedded.py --output embedded_r50.pth
"""

# The detector that uses the weights: its config gives the network's widths and the pixels' scale.
CONFIG = Path(__file__).parents[1] / "configs/quickstart/base.yaml"
CROP_SIZE = 64
BATCH_SIZE = 48
# Includes smaller objects than the scenes have. With the scenes' own sizes, objects fill most of a
# crop; in trials, detectors that started from such a classifier were worse.
OBJECT_SIZES = (20, 76)
HELD_OUT = 960  # crops to measure the accuracy on
SEED = sets.SEED + 2  # the data set's images all begin from sets.SEED


class Crops(Dataset):
    """
    Images with one object each; item i depends only on i.

    Yields:
        (Tensor, int): float (3, CROP_SIZE, CROP_SIZE) in BGR with values in [0, 255], as Detectron2
        reads images; and the index in SHAPE_CLASSES.
    """

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rng = np.random.default_rng([SEED, index])
        image, objects = scenes.render_scene(
            rng, CROP_SIZE, CROP_SIZE, max_objects=1, sizes=OBJECT_SIZES
        )
        bgr = np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1))
        return torch.from_numpy(bgr).float(), objects[0][0]


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        cfg = get_cfg()
        cfg.merge_from_file(str(CONFIG), allow_unsafe=False)
        self.backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3))
        channels = self.backbone.output_shape()["res5"].channels
        self.linear = nn.Linear(channels, len(scenes.SHAPE_CLASSES))
        self.register_buffer("mean", torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(cfg.MODEL.PIXEL_STD).view(3, 1, 1))

    def forward(self, images):
        """(N, 3, H, W) crops to (N, classes) logits."""
        features = self.backbone((images - self.mean) / self.std)["res5"]
        return self.linear(features.mean(dim=(2, 3)))


def train(model, steps):
    """Train with a one-cycle schedule; print the loss and the time left about twenty times."""
    loader = DataLoader(Crops(steps * BATCH_SIZE), batch_size=BATCH_SIZE, num_workers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    model.train()
    start = time.perf_counter()
    for step, (images, labels) in enumerate(loader, start=1):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 20) == 0 or step == steps:
            left = (time.perf_counter() - start) / step * (steps - step)
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {left:.0f} s left", flush=True)


@torch.no_grad()
def accuracy(model, first):
    """Share of HELD_OUT crops, from number ``first`` on, that are named correctly."""
    model.eval()
    held_out = torch.utils.data.Subset(Crops(first + HELD_OUT), range(first, first + HELD_OUT))
    hits = [
        (model(images).argmax(dim=1) == labels).float().mean()
        for images, labels in DataLoader(held_out, batch_size=BATCH_SIZE)
    ]
    return torch.stack(hits).mean().item()


def half_precision(state):
    """A state dict with its floating-point tensors in half precision."""
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


def save(state, path):
    """
    Save a backbone's state under Detectron2's key names, without any prefix.

    ``matching_heuristics`` lets Detectron2 match the names inside a detector by their suffixes.
    """
    content = {"model": state, "__author__": "detectron2-nats", "matching_heuristics": True}
    torch.save(content, path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=sets.WEIGHTS, help="file to write (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=900, help="SGD steps (%(default)s)")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: expected at least 1")
    if not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: the folder {args.output.parent} does not exist")

    torch.manual_seed(SEED)
    model = Classifier()
    train(model, args.steps)
    state = half_precision(model.backbone.state_dict())
    model.backbone.load_state_dict(state)  # measure the weights as they are saved
    print(f"accuracy on unseen crops: {accuracy(model, args.steps * BATCH_SIZE):.3f}")
    save(state, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
