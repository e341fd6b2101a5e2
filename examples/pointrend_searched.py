#!/usr/bin/env python
"""A searched backbone in another Detectron2 project: PointRend, from detectron2.projects.

Another project needs two lines: `import detectron2_nats` and `add_nats_config(cfg)`. After that it
can load an exported config, or use an architecture file as here.
"""

import argparse

from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone
from detectron2.projects.point_rend import add_pointrend_config
from detectron2_nats import Architecture, add_nats_config
from detectron2_nats.search.export import export_config, write_config

EPILOG = """
example:
  $ python examples/pointrend_searched.py output/search/architecture.yaml \\
      --output output/pointrend.yaml
Train the written config with PointRend's train_net.py, after adding add_nats_config(cfg) to it.
"""

BASE = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


def pointrend_config(architecture: Architecture, opts=()) -> CfgNode:
    """PointRend on the searched backbone.

    Args:
        opts: KEY VALUE pairs, such as another depth; the architecture must fit them.
    """
    cfg = get_cfg()
    add_pointrend_config(cfg)
    add_nats_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(BASE))
    # the project's Base-PointRend-RCNN-FPN.yaml, which is not in wheels
    cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES = True
    cfg.MODEL.ROI_MASK_HEAD.NAME = "PointRendMaskHead"
    cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = ""
    cfg.MODEL.ROI_MASK_HEAD.IN_FEATURES = ["p2"]
    cfg.MODEL.ROI_MASK_HEAD.OUTPUT_SIDE_RESOLUTION = 7
    cfg.MODEL.ROI_MASK_HEAD.POINT_HEAD_ON = True
    cfg.MODEL.POINT_HEAD.IN_FEATURES = ["p2"]
    cfg.MODEL.POINT_HEAD.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.merge_from_list(list(opts))
    return export_config(cfg, architecture)


def main(args: argparse.Namespace) -> None:
    cfg = pointrend_config(Architecture.load(args.architecture), args.opts)
    print(build_backbone(cfg).bottom_up)  # building the whole detector would need MODEL.DEVICE
    write_config(cfg, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("architecture", help="architecture file")
    parser.add_argument("--output", required=True, help="config to write")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs, such as MODEL.DEVICE cpu")
    main(parser.parse_args())
