"""Checkpoints: whole or not there, plain, and known to fit."""

import errno
import itertools
import logging
import os
import pickle
import random

import numpy as np
import pytest
import torch
from oracles import FPN_RESNET, randomized, residual_convs, tiny_cfg
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from detectron2.structures import BoxMode
from detectron2.utils import file_io
from detectron2_nats import Architecture, NATSError, add_nats_config
from detectron2_nats.engine.checkpoint import SafeCheckpointer, _damage
from detectron2_nats.engine.weights import (
    check_proposals,
    check_same_dilations,
    warn_of_torchvision,
)
from detectron2_nats.method.names import searched_layers


class State:
    """Something else that a checkpoint holds."""

    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value, "tensor": torch.full((100,), float(self.value))}

    def load_state_dict(self, state):
        self.value = state["value"]


@pytest.fixture
def checkpointer(tmp_path):
    return SafeCheckpointer(nn.Linear(300, 50), str(tmp_path), run=State())


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detectron2_nats"), "parent", logging.getLogger())
    return caplog


def save(checkpointer, *iterations):
    for iteration in iterations:
        checkpointer.checkpointables["run"].value = iteration
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)


def names(folder):
    return sorted(os.listdir(folder))


# -- writing --------------------------------------------------------------------------------------


def test_saves_and_loads_tensors_and_plain_types(checkpointer, tmp_path):
    assert checkpointer.find_usable_checkpoint() == "" and checkpointer.resume_or_load("") == {}
    save(checkpointer, 3)
    assert names(tmp_path) == ["last_checkpoint", "model_0000003.pth"]
    content = torch.load(tmp_path / "model_0000003.pth", weights_only=True)
    assert set(content) == {"model", "run", "iteration"}
    weight = checkpointer.model.weight.detach().clone()
    checkpointer.model.weight.data.zero_()
    checkpointer.checkpointables["run"].value = 0
    assert checkpointer.resume_or_load("") == {"iteration": 3}
    assert torch.equal(checkpointer.model.weight, weight)
    assert checkpointer.checkpointables["run"].value == 3


def fail_half_way(monkeypatch, error):
    def half(obj, file):
        file.write(b"x" * 1000)
        raise error

    monkeypatch.setattr(torch, "save", half)


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("PytorchStreamWriter failed writing file\nmore"), "failed writing file"),
    ],
)
def test_a_failed_write_leaves_the_last_one(checkpointer, tmp_path, monkeypatch, error, words):
    save(checkpointer, 1)
    fail_half_way(monkeypatch, error)
    with pytest.raises(NATSError, match=f"model_0000003.pth could not be written .*{words}") as e:
        save(checkpointer, 3)
    assert "continue with --resume from" in str(e.value) and "model_0000001.pth" in str(e.value)
    assert "\n" not in str(e.value)
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth"]
    monkeypatch.undo()
    assert checkpointer.resume_or_load("") == {"iteration": 1}


def test_a_failed_first_write_says_that_there_is_none(checkpointer, tmp_path, monkeypatch):
    fail_half_way(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(NATSError, match="--resume from the start"):
        save(checkpointer, 1)
    assert names(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")
def test_the_reason_is_the_disks_not_torchs(checkpointer, monkeypatch):
    # torch's zip writer raises an error of its own, "unexpected pos 64 vs 0"
    plain = torch.save

    def on_full_device(obj, file):
        with open("/dev/full", "wb", buffering=0) as full:
            plain(obj, full)

    monkeypatch.setattr(torch, "save", on_full_device)
    with pytest.raises(NATSError, match="No space left on device"):
        save(checkpointer, 1)


def test_a_dead_loader_process_is_not_taken_for_a_full_disk(checkpointer, tmp_path, monkeypatch):
    save(checkpointer, 1)
    fail_half_way(monkeypatch, RuntimeError("DataLoader worker (pid 7) is killed by signal"))
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        save(checkpointer, 2)
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth"]


def test_pruning_keeps_the_newest(checkpointer, tmp_path):
    save(checkpointer, 1, 3, 5, 7, 10000001)
    (tmp_path / "model_best.pth").touch()
    checkpointer.save("model_final", iteration=9)
    checkpointer.prune(2)
    kept = ["last_checkpoint", "model_0000007.pth", "model_10000001.pth"]
    assert names(tmp_path) == [*kept, "model_best.pth", "model_final.pth"]


# -- damage ---------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-500])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def garbage(path):
    path.write_bytes(os.urandom(5000))


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, empty, flip, garbage, remove])
def test_the_one_before_a_damaged_one_is_taken(checkpointer, tmp_path, warnings, damage):
    save(checkpointer, 1, 3, 5)
    newest = tmp_path / "model_0000005.pth"
    damage(newest)
    assert checkpointer.resume_or_load("") == {"iteration": 3}
    lines = [r.getMessage() for r in warnings.records if r.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert lines[0].startswith(f"checkpoint {newest} is damaged (")
    assert lines[0].endswith("): trying the one before it")


def test_all_damaged(checkpointer, tmp_path):
    save(checkpointer, 1, 3)
    for path in tmp_path.glob("*.pth"):
        truncate(path)
    with pytest.raises(NATSError, match="no checkpoint in .* is intact: use another OUTPUT_DIR"):
        checkpointer.resume_or_load("")


def test_a_flip_anywhere_is_seen_or_does_no_harm(checkpointer, tmp_path):
    save(checkpointer, 1)
    path = tmp_path / "model_0000001.pth"
    whole = path.read_bytes()
    expected = torch.load(path, weights_only=True)
    generator = random.Random(0)
    places = [generator.randrange(len(whole)) for _ in range(150)]
    places += range(120)  # the first header
    places += range(len(whole) - 250, len(whole))  # the directory
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        if _damage(str(path)):
            continue
        loaded = torch.load(path, weights_only=True)
        assert torch.equal(loaded["model"]["weight"], expected["model"]["weight"]), place
        assert torch.equal(loaded["run"]["tensor"], expected["run"]["tensor"]), place
        assert loaded["iteration"] == 1, place


# -- strangers' files -----------------------------------------------------------------------------


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("name", ["a.pth", "b.pkl", "old.pth"])
def test_code_in_a_file_is_not_run(checkpointer, tmp_path, name):
    marker, path = tmp_path / "code_was_run", tmp_path / name
    content = {"model": {"weight": torch.zeros(50, 300)}, "x": Payload(str(marker))}
    if name.endswith("pth"):
        torch.save(content, path, _use_new_zipfile_serialization=name == "a.pth")
    else:
        path.write_bytes(pickle.dumps({"model": {"weight": np.zeros(3)}, "x": content["x"]}))
    with pytest.raises(NATSError, match=f"{name}: not readable as weights") as caught:
        checkpointer.load(str(path))
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps([1])])
@pytest.mark.parametrize("name", ["a.pth", "b.pkl"])
def test_what_is_no_weights_file(checkpointer, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NATSError, match=f"{name}: not readable as weights"):
        checkpointer.load(str(tmp_path / name))


def test_detectron2s_and_caffe2s_pkl(tmp_path):
    for name, content in (
        ("d2.pkl", {"model": {"weight": np.ones((2, 3), "float32")}, "__author__": "x"}),
        ("c2.pkl", {"blobs": {"weight": np.ones((2, 3), "float32"), "weight_momentum": 1}}),
    ):
        model = nn.Linear(3, 2)
        (tmp_path / name).write_bytes(pickle.dumps(content))
        SafeCheckpointer(model).load(str(tmp_path / name))
        assert (model.weight == 1).all()


def test_missing_weights(checkpointer):
    with pytest.raises(NATSError, match="weights not found: nowhere.pth"):
        checkpointer.load("nowhere.pth")


def test_weights_that_cannot_be_fetched(checkpointer, tmp_path, monkeypatch):
    monkeypatch.setattr(file_io.Detectron2Handler, "S3_DETECTRON2_PREFIX", "http://127.0.0.1:9/")
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(NATSError, match="detectron2://R-50.pkl: cannot be fetched "):
        checkpointer.load("detectron2://R-50.pkl")


# -- torchvision's names --------------------------------------------------------------------------

ARCHITECTURE = [
    [f"res{stage}.{block}.conv2", [[2 ** (stage + 1), 1, 1], [2 ** (stage + 1), 3, 3]]]
    for stage, blocks in ((3, 4), (4, 6), (5, 3))
    for block in range(blocks)
]


def test_torchvision_weights_fill_every_kind_of_backbone(tmp_path):
    theirs = randomized(ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=16)).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    cfg = get_cfg()
    add_nats_config(cfg)
    cfg.MODEL.RESNETS.STRIDE_IN_1X1, cfg.MODEL.RESNETS.NORM = False, "BN"
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 16
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES
    cfg.MODEL.NATS.SPACE, cfg.MODEL.NATS.BASE_BACKBONE = "A", FPN_RESNET
    states = {}
    for kind in ("plain", "searched", "frozen"):
        cfg.MODEL.BACKBONE.NAME = FPN_RESNET if kind == "plain" else "build_nats_backbone"
        cfg.MODEL.NATS.ARCHITECTURE = ARCHITECTURE if kind == "frozen" else []
        model = nn.Module()
        model.backbone = build_backbone(cfg).eval()
        SafeCheckpointer(model).load(str(tmp_path / "resnet50.pth"))
        states[kind] = model.backbone.bottom_up.state_dict()
        if kind == "plain":
            x = torch.randn(1, 3, 64, 64)
            with torch.no_grad():
                features = model.backbone.bottom_up(x)
                y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
                for stage in range(1, 5):
                    y = getattr(theirs, f"layer{stage}")(y)
                    torch.testing.assert_close(features[f"res{stage + 1}"], y)
        if kind == "searched":
            for conv in searched_layers(model.backbone).values():
                assert all(torch.equal(replica, conv.weight) for replica in conv.replicas)
                assert not conv.alpha.any()
    for kind in ("searched", "frozen"):
        assert all(torch.equal(states[kind][k], v) for k, v in states["plain"].items())


def test_weights_of_another_depth_are_told_of(tmp_path, warnings):
    model, other = nn.Module(), nn.Module()
    model.backbone = build_backbone(tiny_cfg(FPN_RESNET))
    other.backbone = build_backbone(tiny_cfg(FPN_RESNET, ["RESNETS.DEPTH", 101]))
    total = len(residual_convs(other.backbone))
    torch.save({"model": model.state_dict()}, tmp_path / "r50.pth")
    SafeCheckpointer(other).load(str(tmp_path / "r50.pth"))
    assert f"match only 16 of {total} convs" in warnings.text


def test_weights_of_another_network_are_an_error(tmp_path):
    model = nn.Module()
    model.backbone = build_backbone(tiny_cfg(FPN_RESNET))
    torch.save({"model": {"features.0.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(NATSError, match="match nothing in the backbone.*features.0.weight"):
        SafeCheckpointer(model).load(str(tmp_path / "other.pth"))


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_checkpoints_of_other_trainers_are_read_or_refused_in_a_line(tmp_path, prefix):
    """PyTorch's ImageNet example and mmdet keep numbers beside a state_dict."""
    weights = {f"{prefix}layer1.0.conv1.weight": torch.zeros(16, 64, 1, 1)}
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "theirs.pth")
    model = nn.Module()
    model.backbone = build_backbone(tiny_cfg(FPN_RESNET))
    with pytest.raises(NATSError, match="match nothing in the backbone"):
        SafeCheckpointer(model).load(str(tmp_path / "theirs.pth"))


def test_torchvisions_weights_need_other_keys(warnings):
    cfg = get_cfg()
    warn_of_torchvision(cfg)
    assert 'set INPUT.FORMAT "RGB" MODEL.PIXEL_MEAN "[123.675, 116.28, 103.53]"' in warnings.text
    assert 'MODEL.RESNETS.STRIDE_IN_1X1 "False"' in warnings.text
    warnings.clear()
    cfg.INPUT.FORMAT, cfg.MODEL.RESNETS.STRIDE_IN_1X1 = "RGB", False
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    warn_of_torchvision(cfg)
    assert not warnings.text


def test_code_in_a_file_of_proposals_is_not_run(tmp_path):
    path = tmp_path / "proposals.pkl"
    path.write_bytes(pickle.dumps({"boxes": os.system, "ids": [1]}))
    cfg = get_cfg()
    check_proposals(cfg, [str(path)])  # nobody reads it
    cfg.MODEL.LOAD_PROPOSALS = True
    with pytest.raises(NATSError, match="proposals.pkl: not readable as proposals"):
        check_proposals(cfg, [str(path)])
    good = {"boxes": [np.zeros((2, 4))], "ids": [1], "bbox_mode": BoxMode.XYXY_ABS}
    path.write_bytes(pickle.dumps(good | {"objectness_logits": [np.zeros(2)]}))
    check_proposals(cfg, [str(path)])


def test_plain_detectron2s_checkpoint_loads_as_weights(tmp_path):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    DetectionCheckpointer(model, str(tmp_path)).save("model_0000001", iteration=1)
    SafeCheckpointer(other).load(str(tmp_path / "model_0000001.pth"))
    assert torch.equal(model.weight, other.weight)


def test_weights_under_other_dilations_than_they_were_trained_with():
    plain, mixed = tiny_cfg(FPN_RESNET), tiny_cfg(FPN_RESNET)
    mixed.MODEL.BACKBONE.NAME = "build_nats_backbone"
    frozen, other, unchanged, sampled = (mixed.clone() for _ in range(4))
    for cfg, dilation in ((frozen, (3, 3)), (other, (1, 3)), (unchanged, (1, 1))):
        architecture = Architecture.uniform(build_backbone(plain), dilation)
        cfg.MODEL.NATS.ARCHITECTURE = architecture.to_config()
    sampled.MODEL.NATS.SAMPLE = True

    def refused(trained, cfg):
        try:
            saved = {"config": trained.dump(), "computed_by": []}
            check_same_dilations(cfg, saved, "w.pth")
        except NATSError as error:
            assert str(error).startswith("w.pth was trained with other dilations than the config")
            return True
        return False

    for cfg in (plain, mixed, frozen, other, unchanged):
        assert not refused(cfg, cfg) and not refused(sampled, cfg)
        check_same_dilations(cfg, {"config": "of another program"}, "w.pth")
    assert not refused(plain, unchanged) and not refused(unchanged, plain)
    for one, another in itertools.permutations((plain, mixed, frozen, other), 2):
        assert refused(one, another)
