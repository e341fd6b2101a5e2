"""RetinaNet keeps a running mean in a plain attribute: it is part of a run all the same."""

import pytest
from runs import assert_same_run, make_trainer

from detectron2.utils.events import EventStorage
from detectron2_nats.config import load_config

NORMALIZER = "loss_normalizer"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    """The search on bars, small."""
    cfg = load_config("configs/quickstart/bars_search.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.DATASETS.TRAIN = cfg.DATASETS.CALIBRATION = ()
    opts = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 8]
    opts += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "SOLVER.IMS_PER_BATCH", 2, "SEED", 3]
    opts += ["SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2, "INPUT.MIN_SIZE_TRAIN", (64,)]
    opts += ["DATASETS.TRAIN", ("nats_bars_lying_val",), "RUN.LOG_PERIOD", 1]
    opts += ["DATASETS.CALIBRATION", ("nats_bars_lying_calibration",)]
    opts += ["SEARCH.RETRAIN_CONFIG", ""]
    cfg.merge_from_list(opts)
    path = tmp_path_factory.mktemp("config") / "bars.yaml"
    path.write_text(cfg.dump())
    return str(path)


def test_an_alpha_step_leaves_it_as_it_was(config, tmp_path):
    trainer = make_trainer(config, tmp_path / "run")
    assert not hasattr(trainer.model, NORMALIZER)
    with EventStorage(0) as trainer.storage:
        trainer.take_step("weight")
        after_weights = getattr(trainer.model, NORMALIZER)
        assert after_weights != 100
        trainer.take_step("alpha")
        assert getattr(trainer.model, NORMALIZER) == after_weights
        trainer.take_step("weight")
        assert getattr(trainer.model, NORMALIZER) != after_weights


def test_resumes_bit_for_bit(config, tmp_path):
    whole = make_trainer(config, tmp_path / "whole")
    whole.train()
    part = make_trainer(config, tmp_path / "part")
    part.max_iter = 5  # dies after iteration 4; the last checkpoint is that of iteration 3
    save = part.save_checkpoint
    part.save_checkpoint = lambda name: save(name) if "final" not in name else None
    part.train()
    rest = make_trainer(config, tmp_path / "part")
    assert rest.start_iter == 4
    rest.train()
    assert_same_run(tmp_path / "whole", tmp_path / "part")
    assert getattr(rest.model, NORMALIZER) == getattr(whole.model, NORMALIZER)
