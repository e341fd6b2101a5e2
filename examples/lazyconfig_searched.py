#!/usr/bin/env python
"""A searched backbone in one of Detectron2's LazyConfig models.

`apply_architecture` is a function of a backbone, so a LazyConfig can call it like any other
callable: the backbone becomes `L(apply_architecture)(backbone=…, architecture="file.yaml")`.
"""

import argparse
import os

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2_nats import Architecture, apply_architecture

EPILOG = """
example:
  $ python examples/lazyconfig_searched.py output/search/architecture.yaml \\
      --config COCO-Detection/retinanet_R_50_FPN_1x.py --output output/lazy.yaml
Train the written config with Detectron2's tools/lazyconfig_train_net.py.
"""


def with_architecture(model, architecture: str):
    """Apply an architecture file to the backbone of the LazyConfig `model`, in place.

    Change the backbone's own settings before: afterwards they are one level deeper.
    """
    model.backbone = L(apply_architecture)(backbone=model.backbone, architecture=architecture)
    return model


def main(args: argparse.Namespace) -> None:
    Architecture.load(args.architecture)  # fail now, not when training starts
    cfg = model_zoo.get_config(args.config)
    cfg.model = with_architecture(cfg.model, os.path.abspath(args.architecture))
    cfg = LazyConfig.apply_overrides(cfg, args.overrides)
    print(instantiate(cfg.model.backbone).bottom_up)
    os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
    LazyConfig.save(cfg, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("architecture", help="architecture file")
    parser.add_argument(
        "--config",
        default="COCO-Detection/retinanet_R_50_FPN_1x.py",
        help="name of a LazyConfig in the model zoo (%(default)s)",
    )
    parser.add_argument("--output", required=True, help="config to write (.yaml)")
    parser.add_argument("overrides", nargs="*", help="key=value, such as train.max_iter=100")
    main(parser.parse_args())
