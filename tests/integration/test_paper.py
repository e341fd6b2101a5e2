"""The paper's search as documented: COCO, and the weights of Detectron2's model zoo."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2_nats import Architecture

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = (
    "MODEL.DEVICE cpu SOLVER.IMS_PER_BATCH 1 SOLVER.REFERENCE_WORLD_SIZE 0 SOLVER.MAX_ITER 2 "
    "MODEL.RESNETS.WIDTH_PER_GROUP 16 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.FPN.OUT_CHANNELS 16 "
    "MODEL.ROI_BOX_HEAD.FC_DIM 32 INPUT.MIN_SIZE_TRAIN (64,) DATALOADER.NUM_WORKERS 0 "
    "DATASETS.TEST () SEARCH.SCORE_IMAGES 0 SEARCH.RETRAIN_CONFIG "
)


def write_coco(folder, split, annotated, ids):
    """Images with a box each, where Detectron2 looks for COCO's."""
    categories = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    images, annotations = [], []
    (folder / split).mkdir(parents=True)
    for i in ids:
        name = f"COCO_{split}_{i:012d}.jpg"
        pixels = np.random.default_rng(i).integers(0, 255, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / split / name)
        images.append({"id": i, "file_name": name, "width": 80, "height": 64})
        box = {"bbox": [8, 8, 40, 30], "area": 1200, "iscrowd": 0}
        annotations.append({"id": i, "image_id": i, "category_id": 1 + i % 8, **box})
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"instances_{annotated}.json").write_text(json.dumps(content))


def caffe2_r50():
    """Random weights of a narrow ResNet-50, with the names of ImageNetPretrained/MSRA/R-50.pkl."""
    rng, blobs, channels = np.random.default_rng(0), {}, 64

    def conv(name, outputs, inputs, size, norm="", scale=1.0):
        weight = rng.standard_normal((outputs, inputs, size, size), dtype=np.float32)
        blobs[f"{name}_w"] = weight * (2 / (inputs * size * size)) ** 0.5
        blobs[f"{norm or name}_bn_s"] = np.full(outputs, scale, np.float32)
        blobs[f"{norm or name}_bn_b"] = np.zeros(outputs, np.float32)

    conv("conv1", 64, 3, 7, norm="res_conv1")
    for stage, blocks, width in ((2, 3, 16), (3, 4, 32), (4, 6, 64), (5, 3, 128)):
        for block in range(blocks):
            name = f"res{stage}_{block}_branch"
            if not block:
                conv(f"{name}1", 4 * width, channels, 1)
            conv(f"{name}2a", width, channels, 1)
            conv(f"{name}2b", width, width, 3)
            conv(f"{name}2c", 4 * width, width, 1, scale=0.2)
            channels = 4 * width
    return {"blobs": blobs}


def test_search_on_coco_from_imagenets_weights(tmp_path):
    coco, cache = tmp_path / "data" / "coco", tmp_path / "cache"
    write_coco(coco, "train2014", "train2014", range(1, 4))
    write_coco(coco, "val2014", "valminusminival2014", range(11, 14))
    # where a download would lie
    weights = cache / "detectron2" / "ImageNetPretrained" / "MSRA" / "R-50.pkl"
    weights.parent.mkdir(parents=True)
    blobs = caffe2_r50()
    weights.write_bytes(pickle.dumps(blobs, protocol=2))
    output = tmp_path / "search"
    command = ["search_net.py", "--config-file", "configs/search/faster_rcnn_R_50_FPN.yaml"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command, *SMALL.split(" "), "OUTPUT_DIR", str(output)],
        cwd=REPOSITORY,
        env={**os.environ, "DETECTRON2_DATASETS": str(coco.parent), "FVCORE_CACHE": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "the weights match only" not in done.stdout
    trained = torch.load(output / "model_final.pth", weights_only=True)["model"]
    for name, blob in (("stem.conv1", "conv1"), ("res5.2.conv2", "res5_2_branch2b")):
        weight = trained[f"backbone.bottom_up.{name}.weight"]
        assert np.allclose(weight, blobs["blobs"][f"{blob}_w"], atol=0.01)  # two steps of warm-up
    architecture = Architecture.load(str(output / "architecture.yaml"))
    assert architecture.stages == ("res3", "res4", "res5")
