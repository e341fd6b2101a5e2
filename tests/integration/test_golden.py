"""The first 20 iterations of a search give the losses that they gave before, in a file.

A test of resuming compares a run with itself: a changed step passes it. In float64, and with a
detector that samples no regions, other CPUs give the same numbers. After a change that is meant to
move the losses, write them anew: `PYTHONPATH=tests python tests/integration/test_golden.py`.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from runs import TINY, make_trainer

from detectron2.utils.events import EventStorage

FILE = Path(__file__).resolve().parents[1] / "golden" / "losses.json"
ITERATIONS, START = 20, 6
KINDS = {"mixed": [], "sampled": ["MODEL.NATS.SAMPLE", True]}
DENSE = """
MODEL.META_ARCHITECTURE RetinaNet
MODEL.NATS.BASE_BACKBONE build_retinanet_resnet_fpn_backbone
MODEL.FPN.IN_FEATURES ["res3","res4","res5"]
MODEL.RETINANET.NUM_CLASSES 5
MODEL.RETINANET.NUM_CONVS 1
MODEL.ANCHOR_GENERATOR.SIZES [[16],[32],[48],[64],[96]]
"""
TOLERANCE = 1e-6  # equal to the bit with AVX2 and AVX-512, and with 1, 2 and 4 threads


def losses(config: str, folder, kind: str) -> dict:
    """Both losses of each iteration, and what α came to."""
    options = ["SOLVER.MAX_ITER", ITERATIONS, "SEARCH.ALPHA_START", START / ITERATIONS]
    trainer = make_trainer(config, folder, *options, *DENSE.split(), *KINDS[kind])
    trainer.model.double()
    found = {"total_loss": [], "alpha/total_loss": []}
    with EventStorage(0) as trainer.storage:
        for trainer.iter in range(ITERATIONS):
            trainer.run_step()
            latest = trainer.storage.latest()
            for name, values in found.items():
                if name in latest:
                    values.append(latest[name][0])
            trainer.storage.step()
    alphas = torch.cat([torch.as_tensor(a).flatten() for a in trainer.alphas().values()])
    return {**found, "alpha": [alphas.abs().mean().item()]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_losses_are_as_before(kind, tiny_config, tmp_path):
    expected = json.loads(FILE.read_text())[kind]
    found = losses(tiny_config, tmp_path / "run", kind)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=TOLERANCE), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch, "tiny.yaml")
        config.write_text(TINY)
        made = {kind: losses(str(config), Path(scratch, kind), kind) for kind in KINDS}
    if sys.argv[1:] == ["compare"]:
        for kind, old in json.loads(FILE.read_text()).items():
            for name, values in old.items():
                a, b = (torch.as_tensor(v).double() for v in (values, made[kind][name]))
                print(kind, name, f"{((a - b) / a).abs().max():.1e}")
    else:
        FILE.write_text(json.dumps(made, indent=1) + "\n")
