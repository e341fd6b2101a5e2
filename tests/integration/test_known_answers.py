"""Does a search find what is known to be right? On bars, whose class lies at their two ends.

Lying bars want dilations along the width, standing ones along the height. A gradient of α with the
wrong sign fails here, and so do height and width swapped anywhere between layer, decode and file.
Minutes: two searches, cut short.
"""

import pytest
import torch
from runs import make_trainer

from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from detectron2_nats import Architecture, add_nats_config
from detectron2_nats.look.receptive_field import effective_receptive_fields


def extents(backbone):
    """Standard deviations (along the height, along the width) of what res3's centre sees, px."""
    torch.manual_seed(0)
    field = torch.from_numpy(
        effective_receptive_fields(backbone.eval(), torch.randn(4, 3, 192, 192))["res3"]
    )
    place = torch.arange(192.0)
    spreads = []
    for axis in (1, 0):  # summed over the other one
        profile = field.sum(axis)
        mean = (profile * place).sum()
        spreads.append(float((profile * (place - mean) ** 2).sum() ** 0.5))
    return spreads


@pytest.mark.parametrize(
    "bars, wanted, other, sample",
    [("lying", (1, 3), (3, 1), True), ("standing", (3, 1), (1, 3), False)],
)
def test_the_search_finds_the_known_answer(tmp_path, bars, wanted, other, sample):
    opts = ["DATASETS.TRAIN", (f"nats_bars_{bars}_train",), "SEED", 0, "MODEL.DEVICE", "cpu"]
    opts += ["DATASETS.CALIBRATION", (f"nats_bars_{bars}_calibration",)]
    opts += ["SOLVER.MAX_ITER", 100, "SOLVER.WARMUP_ITERS", 20, "SEARCH.ALPHA_LR", 0.085]
    opts += ["MODEL.NATS.SAMPLE", sample, "SEARCH.RETRAIN_CONFIG", "configs/quickstart/bars.yaml"]
    make_trainer("configs/quickstart/bars_search.yaml", tmp_path, *opts).train()
    found = Architecture.load(str(tmp_path / "architecture.yaml"))
    shares = found.shares()
    assert next(iter(shares)) == wanted and shares[wanted] > 0.6, shares
    assert shares.get(other, 0.0) <= 0.1, shares

    # from the file to what the frozen network sees
    cfg = get_cfg()
    add_nats_config(cfg)
    cfg.merge_from_file(str(tmp_path / "retrain.yaml"), allow_unsafe=False)
    height, width = extents(build_backbone(cfg))
    cfg.MODEL.BACKBONE.NAME = cfg.MODEL.NATS.BASE_BACKBONE
    plain_height, plain_width = extents(build_backbone(cfg))
    longer, shorter = (width, height) if bars == "lying" else (height, width)
    plain = plain_width if bars == "lying" else plain_height
    assert longer > 1.4 * shorter and longer > 1.4 * plain
