"""Small runs on the embedded data set, in this process or by the scripts themselves."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]

TINY = """
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  DEVICE: cpu
  WEIGHTS: ""
  PIXEL_STD: [57.0, 57.0, 57.0]
  BACKBONE: {NAME: build_nats_backbone, FREEZE_AT: 0}
  NATS: {SPACE: A, NUM_GROUPS: 4}
  RESNETS:
    DEPTH: 50
    NORM: BN
    STEM_OUT_CHANNELS: 8
    WIDTH_PER_GROUP: 8
    RES2_OUT_CHANNELS: 16
    OUT_FEATURES: [res2, res3, res4, res5]
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 16, NORM: BN}
  ANCHOR_GENERATOR: {SIZES: [[16], [32], [64], [96], [128]], ASPECT_RATIOS: [[0.5, 1.0, 2.0]]}
  RPN:
    IN_FEATURES: [p2, p3, p4, p5, p6]
    CONV_DIMS: [16]
    PRE_NMS_TOPK_TRAIN: 100
    POST_NMS_TOPK_TRAIN: 50
    PRE_NMS_TOPK_TEST: 100
    POST_NMS_TOPK_TEST: 50
  ROI_HEADS:
    NAME: StandardROIHeads
    IN_FEATURES: [p2, p3, p4, p5]
    BATCH_SIZE_PER_IMAGE: 16
    NUM_CLASSES: 5
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 32, POOLER_RESOLUTION: 3}
DATASETS:
  TRAIN: [nats_embedded_train]
  CALIBRATION: [nats_embedded_calibration]
  TEST: []
DATALOADER: {NUM_WORKERS: 0, FILTER_EMPTY_ANNOTATIONS: true, ASPECT_RATIO_GROUPING: true}
INPUT: {MIN_SIZE_TRAIN: [48, 64], MAX_SIZE_TRAIN: 80, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 80}
SOLVER:
  IMS_PER_BATCH: 2
  BASE_LR: 0.01
  BASE_LR_END: 0.0001
  LR_SCHEDULER_NAME: WarmupCosineLR
  WARMUP_ITERS: 2
  MAX_ITER: 6
  CHECKPOINT_PERIOD: 2
SEARCH: {ALPHA_START: 0.34, SCORE_IMAGES: 0}
RUN: {LOG_PERIOD: 1, RANK_CHECK_PERIOD: 1}
SEED: 7
"""


def script(name: str, *arguments: str, launcher=(), **popen) -> subprocess.Popen:
    """Start a script of the repository, or a command; what it prints goes to `process.log`.

    Args:
        launcher: the words before the script's name, if not Python alone.
    """
    if name.startswith("nats-"):
        name = str(Path(sys.executable).with_name(name))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment.update(popen.pop("env", {}))
    log = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would stop it
    process = subprocess.Popen(
        [*(launcher or (sys.executable,)), name, *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        **popen,
    )
    process.log = log
    return process


def finish(process: subprocess.Popen, status: int = 0, timeout: float = 240) -> str:
    """Wait for a script, check its exit status, return its output."""
    try:
        process.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"no end after {timeout} s:\n{printed(process)[-3000:]}") from None
    output = printed(process)
    assert process.returncode == status, f"exit status {process.returncode}:\n{output[-3000:]}"
    return output


def wait_until(condition, process: subprocess.Popen, timeout: float = 120) -> None:
    """Wait for `condition()` while the script runs."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, printed(process)[-3000:]
        assert time.monotonic() < deadline, f"not after {timeout} s:\n{printed(process)[-3000:]}"
        time.sleep(0.03)


def printed(process: subprocess.Popen) -> str:
    # pread: the process writes at the file's position, which must not be moved under it
    handle = process.log.fileno()
    return os.pread(handle, os.fstat(handle).st_size, 0).decode(errors="replace")


def run(name: str, *arguments: str, status: int = 0, **popen) -> str:
    return finish(script(name, *arguments, **popen), status)


def assert_same_run(one: str, other: str, checkpoint: str = "model_final.pth") -> None:
    """Weights, α, optimizers, random states and architecture of two runs are equal, bit for bit."""
    a, b = (
        torch.load(os.path.join(folder, checkpoint), weights_only=True) for folder in (one, other)
    )
    for part in ("model", "run", "iteration"):
        assert_equal(a[part], b[part], part)
    if os.path.exists(os.path.join(one, "architecture.yaml")):
        one_yaml, other_yaml = (
            Path(folder, "architecture.yaml").read_text() for folder in (one, other)
        )
        assert one_yaml == other_yaml


def assert_equal(a, b, path: str) -> None:
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{path}[{index}]")
    else:
        assert a == b, path


def make_trainer(config: str, folder, *opts, kind="search"):
    """A trainer in this process, at its start or resumed."""
    from detectron2.utils import comm
    from detectron2.utils.env import seed_all_rng
    from detectron2_nats import SearchTrainer
    from detectron2_nats.config import load_config
    from detectron2_nats.engine.resumable import ResumableTrainer

    cfg = load_config(config, ["OUTPUT_DIR", str(folder), *opts])
    cfg.freeze()
    os.makedirs(folder, exist_ok=True)
    seed_all_rng(cfg.SEED + comm.get_rank())  # as default_setup
    trainer = (SearchTrainer if kind == "search" else ResumableTrainer)(cfg)
    trainer.resume_or_load(resume=True)
    return trainer
