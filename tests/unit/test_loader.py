"""Batches that depend only on a seed and a position; images that cannot be read."""

import gc
import itertools
import logging
import multiprocessing
import os
import random
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.structures import BoxMode
from detectron2_nats import NATSError, add_nats_config
from detectron2_nats.engine import loader as loader_module
from detectron2_nats.engine.loader import EvaluationLoader, ResumableLoader

COUNT = 12


@pytest.fixture
def dicts(tmp_path):
    """Wide and tall images of one box each; category 1 is rare."""
    generator, records = np.random.default_rng(0), []
    for i in range(COUNT):
        width, height = (24, 16) if i % 3 else (16, 24)
        path = tmp_path / f"{i}.png"
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        box = {"bbox": [1, 1, 9, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": int(i == 0)}
        records.append(
            {
                "file_name": str(path),
                "image_id": i,
                "width": width,
                "height": height,
                "annotations": [box],
            }
        )
    return records


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detectron2_nats"), "parent", logging.getLogger())
    return caplog


def lines(warnings):
    return [r.getMessage() for r in warnings.records if r.levelno >= logging.WARNING]


def build(dicts, *opts, seed=5, batch=2, share=0.5, workers=0):
    name = "nats_test_loader"
    DatasetCatalog.register(name, lambda: dicts)
    cfg = get_cfg()
    add_nats_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (16, 20, 24), 40
    cfg.INPUT.CROP.ENABLED = True
    cfg.RUN.MAX_BAD_DATA, cfg.DATALOADER.NUM_WORKERS = share, workers
    cfg.merge_from_list(list(opts))
    try:
        return ResumableLoader(cfg, [name], total_batch_size=batch, seed=seed)
    finally:
        DatasetCatalog.remove(name)


def take(loader, count):
    return list(itertools.islice(iter(loader), count))


def ids(batches):
    return [[sample["image_id"] for sample in batch] for batch in batches]


def assert_same(one, other):
    assert ids(one) == ids(other)
    for a, b in zip(itertools.chain(*one), itertools.chain(*other)):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)


def test_records_without_sizes_are_named(dicts):
    del dicts[3]["width"]
    with pytest.raises(NATSError, match="nats_test_loader: records without width and height"):
        build(dicts)


# -- the same batches -----------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", [True, False])
def test_the_same_with_any_number_of_workers(dicts, grouping):
    opts = ["DATALOADER.ASPECT_RATIO_GROUPING", grouping]
    expected = take(build(dicts, *opts), 15)
    for workers in (1, 2):
        assert_same(expected, take(build(dicts, *opts, workers=workers), 15))
    other = take(build(dicts, *opts, seed=6), 15)
    assert ids(other) != ids(expected)


def test_a_loader_process_that_never_starts_is_started_anew(dicts, monkeypatch, warnings):
    """As in CPython 3.10.13 now and then, when a thread of gloo enters the interpreter."""
    monkeypatch.setattr(loader_module, "_PATIENCE_S", 2)
    forks = []

    def hang():
        if not forks:
            time.sleep(1000)

    os.register_at_fork(after_in_parent=lambda: forks.append(1), after_in_child=hang)
    expected = take(build(dicts), 6)
    others = set(multiprocessing.active_children())
    assert_same(expected, take(build(dicts, workers=2), 6))
    assert len(forks) >= 4
    assert "a loader process has not started: " in lines(warnings)[0]
    gc.collect()
    assert set(multiprocessing.active_children()) <= others


def test_the_same_after_a_resume_at_any_position(dicts):
    whole = take(build(dicts), 12)
    for position in range(12):
        first = build(dicts)
        take(first, position)
        state = first.state_dict()
        assert state["batches"] == position
        second = build(dicts, seed=99)  # the state's own rules
        second.load_state_dict(state)
        assert_same(whole[position:], take(second, 12 - position))
    third = build(dicts, workers=2)
    third.load_state_dict({**third.state_dict(), "batches": 7})
    assert_same(whole[7:], take(third, 5))


def test_augmentation_depends_on_seed_and_position_only(dicts):
    expected = take(build(dicts), 6)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    assert_same(expected, take(build(dicts), 6))
    # the same image is not cut the same way again
    shapes = {}
    for sample in itertools.chain(*take(build(dicts), 60)):
        shapes.setdefault(sample["image_id"], []).append(sample["image"].float().mean().item())
    assert all(len(set(means)) > len(means) // 2 for means in shapes.values())


def test_global_random_states_are_left_alone(dicts):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for workers in (0, 2):
        take(build(dicts, workers=workers), 5)
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def test_grouping_is_detectron2s(dicts):
    ours = ids(take(build(dicts, batch=3), 20))
    stream = (dicts[i] for i in TrainingSampler(COUNT, seed=5))
    assert ours == ids(itertools.islice(AspectRatioGroupedDataset(stream, 3), 20))


@pytest.mark.parametrize(
    "name, sampler",
    [
        ("TrainingSampler", lambda dicts: TrainingSampler(COUNT, seed=5)),
        (
            "RepeatFactorTrainingSampler",
            lambda dicts: RepeatFactorTrainingSampler(
                RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, 0.3),
                seed=5,
            ),
        ),
        (
            "RandomSubsetTrainingSampler",
            lambda dicts: RandomSubsetTrainingSampler(COUNT, 0.5, seed_shuffle=5, seed_subset=5),
        ),
    ],
)
def test_the_order_is_detectron2s(dicts, name, sampler):
    opts = ["DATALOADER.SAMPLER_TRAIN", name, "DATALOADER.ASPECT_RATIO_GROUPING", False]
    opts += ["DATALOADER.REPEAT_THRESHOLD", 0.3, "DATALOADER.RANDOM_SUBSET_RATIO", 0.5]
    ours = list(itertools.chain(*ids(take(build(dicts, *opts), 20))))
    assert ours == list(itertools.islice(sampler(dicts), 40))
    resumed = build(dicts, *opts)
    resumed.load_state_dict({**resumed.state_dict(), "batches": 9})
    assert list(itertools.chain(*ids(take(resumed, 11)))) == ours[18:]


def test_each_rank_has_its_share_and_its_own_augmentation(dicts, monkeypatch):
    opts = ["DATALOADER.ASPECT_RATIO_GROUPING", False]
    expected = list(itertools.islice(TrainingSampler(COUNT, seed=5), 24))
    ranks = []
    for rank in (0, 1):
        monkeypatch.setattr(loader_module.comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(loader_module.comm, "get_world_size", lambda: 2)
        ranks.append(list(itertools.chain(*ids(take(build(dicts, *opts, batch=4), 6)))))
    assert [i for pair in zip(*ranks) for i in pair] == expected


def test_a_position_in_other_data_is_refused(dicts):
    state = build(dicts).state_dict()
    dicts[3]["annotations"][0]["bbox"] = [1, 1, 9, 8]
    with pytest.raises(NATSError, match="nats_test_loader had 12 images .*, it has 12 .* Restore"):
        build(dicts).load_state_dict(state)


@pytest.mark.parametrize("batch, processes", [(0, 1), (-2, 1), (3, 2)])
def test_a_batch_that_cannot_be_shared(dicts, monkeypatch, batch, processes):
    monkeypatch.setattr(loader_module.comm, "get_world_size", lambda: processes)
    words = f"a batch of {batch} images cannot be shared by {processes} processes"
    with pytest.raises(NATSError, match=words):
        build(dicts, batch=batch)


# -- images that cannot be read -------------------------------------------------------------------


def garbage(path):
    path.write_bytes(b"no image")


def missing(path):
    path.unlink()


def wrong_size(path):
    Image.new("RGB", (7, 7)).save(path)


@pytest.mark.parametrize("damage", [garbage, missing, wrong_size])
def test_a_bad_image_is_replaced_with_one_warning(dicts, tmp_path, warnings, damage):
    whole = take(build(dicts), 18)
    damage(tmp_path / "5.png")
    loader = build(dicts)
    batches = take(loader, 18)  # three epochs
    expected = [[6 if i == 5 else i for i in batch] for batch in ids(whole)]
    assert ids(batches) == expected and ids(whole) != expected
    assert loader.bad_files == {str(tmp_path / "5.png")}
    (line,) = lines(warnings)
    assert line.startswith(
        f"skipping image {tmp_path / '5.png'}, which cannot be read (1 of 12 so far): "
    )
    assert_same(batches, take(build(dicts, workers=2), 18))


@pytest.mark.parametrize("workers", [0, 2])
def test_past_the_share_the_run_stops(dicts, tmp_path, workers):
    for i in (2, 5, 8):
        missing(tmp_path / f"{i}.png")
    take(build(dicts, share=0.25, workers=workers), 10)
    with pytest.raises(NATSError, match=r"3 of 12 images cannot be read.*RUN.MAX_BAD_DATA \(0.2\)"):
        take(build(dicts, share=0.2, workers=workers), 10)


def test_no_image_at_all(dicts, tmp_path):
    for path in tmp_path.glob("*.png"):
        missing(path)
    with pytest.raises(NATSError, match="20 images in a row cannot be used, the first .*png: "):
        take(build(dicts, share=1.0), 1)


def test_errors_of_the_code_are_not_swallowed(dicts, monkeypatch):
    def broken(self, record):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(DatasetMapper, "__call__", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        take(build(dicts), 1)


class Record(dict):
    """A dict that can be watched."""


def test_the_list_of_dicts_is_not_kept(dicts):
    """Loader processes would copy it, page by page, each for itself."""
    opts = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]
    expected = take(build(dicts, *opts), 6)
    records = [Record(record) for record in dicts]
    first = weakref.ref(records[0])
    loader = build(records, *opts)
    del records
    gc.collect()
    assert first() is None
    assert_same(expected, take(loader, 6))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_stops_at_the_next_image_or_at_one_that_cannot_be_read(
    dicts, monkeypatch, workers
):
    """Without it the AP would be another."""
    name = f"nats_test_images_{workers}"
    DatasetCatalog.register(name, lambda: dicts)
    cfg = get_cfg()
    add_nats_config(cfg)
    cfg.DATALOADER.NUM_WORKERS = workers
    loader = EvaluationLoader(cfg, name)
    assert [s["image_id"] for batch in loader for s in batch] == [*range(COUNT)]
    assert len(loader) == COUNT
    garbage(Path(dicts[3]["file_name"]))
    batches = iter(EvaluationLoader(cfg, name))
    assert [next(batches)[0]["image_id"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(NATSError, match=f"test image {dicts[3]['file_name']} cannot be read: "):
        next(batches)
    batches = iter(EvaluationLoader(cfg, name))
    DatasetCatalog.remove(name)
    next(batches)
    monkeypatch.setattr(loader_module, "stop_requested", lambda: True)
    with pytest.raises(SystemExit, match="75"):
        next(batches)
