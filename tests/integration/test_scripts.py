"""The scripts as a user starts them: what a stop, a kill and an error do to whole runs."""

import contextlib
import logging
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import yaml
from calls import call
from ranks import on_two_ranks
from runs import assert_same_run, finish, make_trainer, printed, run, script, wait_until
from test_lock import holder  # noqa: F401  (a fixture)

from detectron2.utils.logger import setup_logger
from detectron2_nats import SearchTrainer
from detectron2_nats.engine import lock
from detectron2_nats.engine.resumable import ResumableTrainer

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def wait_for(path: Path, process) -> None:
    """Until the file is there."""
    wait_until(path.exists, process)


def wait_for_text(text: str, process) -> None:
    """Until the process has printed it."""
    wait_until(lambda: text in printed(process), process)


def trained(config, folder):
    make_trainer(config, folder).train()


@pytest.fixture(scope="module")
def undisturbed(tiny_config, tmp_path_factory) -> Path:
    """A search of 6 iterations that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    trained(tiny_config, folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed_pair(tiny_config, tmp_path_factory) -> Path:
    """The same on two gloo processes."""
    folder = tmp_path_factory.mktemp("pair")
    on_two_ranks(trained, tiny_config, str(folder))
    return folder


def command(*words, status=0) -> str:
    """What it prints; its exit status is checked. It logs to the stream of now."""
    setup_logger.cache_clear()
    return call(*words, status=status)


@pytest.fixture
def own_process(monkeypatch):
    """What a command changes in this process is put back."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore")]
    before = [list(logger.handlers) for logger in loggers]
    ours = logging.getLogger("detectron2_nats")
    monkeypatch.setattr(ours, "parent", ours.parent)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for logger, handlers in zip(loggers, before):
        logger.handlers = handlers
    while lock._held:
        lock._held.popitem()[1].close()


# -- one process, in this one ---------------------------------------------------------------------


def test_search_export_retrain_evaluate(own_process, undisturbed, tiny_config, tmp_path):
    search = tmp_path / "search"
    words = ["--config-file", tiny_config, "OUTPUT_DIR", search]
    command("nats-search", *words)
    assert_same_run(undisturbed, search)  # from Python, a search does what the command does
    for name in ("architecture.yaml", "retrain.yaml"):
        texts = [(folder / name).read_text() for folder in (undisturbed, search)]
        assert texts[0] == texts[1].replace(str(search), str(undisturbed))
    content = yaml.safe_load((search / "retrain.yaml").read_text())
    assert content["MODEL"]["BACKBONE"]["NAME"] == "build_nats_backbone"
    assert "SEARCH" not in content and "CALIBRATION" not in content["DATASETS"]

    # another detector, by the tool
    retinanet, base, folder = (tmp_path / name for name in ("r.yaml", "base.yaml", "retinanet"))
    base.write_text(
        f"_BASE_: {tiny_config}\n"
        "MODEL:\n"
        "  META_ARCHITECTURE: RetinaNet\n"
        "  BACKBONE: {NAME: build_retinanet_resnet_fpn_backbone}\n"
        "  RESNETS: {OUT_FEATURES: [res3, res4, res5]}\n"
        "  FPN: {IN_FEATURES: [res3, res4, res5]}\n"
        "  RETINANET: {NUM_CLASSES: 5, IN_FEATURES: [p3, p4, p5, p6, p7], NUM_CONVS: 1}\n"
    )
    command("nats-export", search, "--config-file", base, "--output", retinanet)
    tests = ["OUTPUT_DIR", folder, "DATASETS.TEST", "('nats_embedded_val',)"]
    printed = command("nats-train", "--config-file", retinanet, *tests, "SOLVER.MAX_ITER", 3)
    assert "Evaluation results for nats_embedded_val" in printed
    weights = ["MODEL.WEIGHTS", folder / "model_final.pth"]
    evaluate = ["nats-train", "--eval-only", "--config-file"]
    assert "Evaluation results" in command(*evaluate, retinanet, *tests, *weights)
    printed = command(
        *evaluate, base, *tests, *weights, status=2
    )  # they fit the plain network, too
    assert f"{weights[1]} was trained with other dilations than the config has" in printed


@pytest.mark.parametrize("number", SIGNALS)
def test_stops_on_request(own_process, undisturbed, tiny_config, tmp_path, monkeypatch, number):
    words = ["nats-search", "--resume", "--config-file", tiny_config, "OUTPUT_DIR", tmp_path]
    run_step = SearchTrainer.run_step

    def interrupted(trainer):
        if trainer.iter == 2:
            os.kill(os.getpid(), number)
        run_step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(SearchTrainer, "run_step", interrupted)
        assert "stopped on request after iteration 2" in command(*words, status=75)
    command(*words)
    assert_same_run(undisturbed, tmp_path)


def test_an_evaluation_alone_stops_on_request(
    own_process, undisturbed, tiny_config, tmp_path, monkeypatch
):
    build = ResumableTrainer.build_evaluator.__func__

    def interrupted(cls, cfg, name):
        os.kill(os.getpid(), signal.SIGTERM)
        return build(cls, cfg, name)

    monkeypatch.setattr(ResumableTrainer, "build_evaluator", classmethod(interrupted))
    words = ["--config-file", tiny_config, "OUTPUT_DIR", tmp_path]
    words += ["MODEL.WEIGHTS", undisturbed / "model_final.pth"]
    words += ["DATASETS.TEST", "('nats_embedded_val',)"]
    assert "stopped on request" in command("nats-search", "--eval-only", *words, status=75)


def test_a_second_run_in_the_folder_of_a_living_one_is_refused(
    own_process, holder, undisturbed, tiny_config, tmp_path, monkeypatch  # noqa: F811
):
    monkeypatch.setattr(lock, "PATIENCE_S", 0.3)
    words = ["--config-file", tiny_config, "OUTPUT_DIR", tmp_path]
    words = command("nats-search", *words, status=2)
    assert f"error: {tmp_path} is in use by another run, process {holder.pid} on " in words
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_config_yaml_stays_what_made_the_checkpoints(own_process, tiny_config, tmp_path):
    """Exports and scores rely on it."""
    words = ["--config-file", tiny_config, "OUTPUT_DIR", tmp_path]
    command("nats-search", *words)
    config = tmp_path / "config.yaml"
    before = config.read_text()
    printed = command("nats-search", *words, "MODEL.NATS.SPACE", "B", status=2)
    assert "contains checkpoints of an earlier run" in printed
    printed = command("nats-search", "--resume", *words, "MODEL.NATS.SPACE", "B", status=2)
    assert "a run with other settings: MODEL.NATS.SPACE: 'A', now 'B'" in printed
    opts = ["DATASETS.TEST", "('nats_embedded_val',)", "TEST.DETECTIONS_PER_IMAGE", 1]
    opts += ["MODEL.WEIGHTS", tmp_path / "model_final.pth"]
    command("nats-search", "--eval-only", *words, *opts)
    assert config.read_text() == before
    command("nats-search", "--resume", *words, "SOLVER.CHECKPOINT_PERIOD", 3)
    assert config.read_text() == before.replace("CHECKPOINT_PERIOD: 2", "CHECKPOINT_PERIOD: 3")


# -- processes of their own -----------------------------------------------------------------------


def test_survives_sigkill_and_a_stop_in_an_evaluation(undisturbed, tiny_config, tmp_path):
    """Schedulers signal whole process groups: loader processes too."""
    arguments = ["--config-file", tiny_config, "--resume", "OUTPUT_DIR", str(tmp_path)]
    arguments += ["DATALOADER.NUM_WORKERS", "2"]
    process = script("search_net.py", *arguments, start_new_session=True)
    wait_for(tmp_path / "model_0000001.pth", process)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for name in ("model_final.pth", "model_0000005.pth"):  # it may have been quick
        (tmp_path / name).unlink(missing_ok=True)
    # no checkpoint of its own stands at the evaluation
    period = ["SOLVER.CHECKPOINT_PERIOD", "100", "TEST.EVAL_PERIOD", "5"]
    tests = ["DATASETS.TEST", "('nats_embedded_val',)"]
    process = script("search_net.py", *arguments, *period, *tests, start_new_session=True)
    wait_for_text("Start inference on", process)
    os.killpg(process.pid, signal.SIGTERM)
    output = finish(process, status=75)
    assert re.search(r"Starting training from iteration [24]", output)
    assert "stopped on request, in the middle of an evaluation" in output
    assert "Evaluation results" not in output and "Traceback" not in output
    trained(tiny_config, tmp_path)
    assert_same_run(undisturbed, tmp_path)


def gone(pid: int) -> bool:
    """Dead, or waiting for its exit status to be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def ranks_of(launcher):
    path = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    commands = {pid: Path(f"/proc/{pid}/cmdline") for pid in map(int, path.read_text().split())}
    ranks = [pid for pid, c in commands.items() if b"resource_tracker" not in c.read_bytes()]
    assert len(ranks) == 2
    return ranks


def killed_alone(launcher) -> None:
    """Kill it, and see that its two ranks die."""
    ranks = ranks_of(launcher)
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)  # else they might have come to their end
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 3
    try:
        while not all(map(gone, ranks)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)


def test_two_processes_go_on_after_a_stop_and_after_a_kill(undisturbed_pair, tiny_config, tmp_path):
    arguments = ["--num-gpus", "2", "--config-file", tiny_config, "--resume"]
    arguments += ["OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", "2"]
    process = script("search_net.py", *arguments)
    wait_for(tmp_path / "model_0000001.pth", process)
    process.send_signal(signal.SIGTERM)
    finish(process, status=75)
    process = script("search_net.py", *arguments)
    wait_for_text("Starting training from iteration", process)
    killed_alone(process)
    on_two_ranks(trained, tiny_config, str(tmp_path))
    assert_same_run(undisturbed_pair, tmp_path)


def test_torchrun_restarts_after_a_rank_died(undisturbed_pair, tiny_config, tmp_path):
    arguments = ["--config-file", tiny_config, "--resume", "OUTPUT_DIR", str(tmp_path)]
    process = script(*TORCHRUN, "search_net.py", *arguments)
    wait_for_text("Starting training from iteration 0", process)
    killed_alone(process)
    process = script(*TORCHRUN, "--max-restarts", "2", "search_net.py", *arguments)
    wait_for(tmp_path / "model_0000001.pth", process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    output = finish(process)
    assert re.search(r"Starting training from iteration [1-9]", output)
    assert_same_run(undisturbed_pair, tmp_path)


def test_a_number_that_is_not_finite_on_one_rank_ends_both(tiny_config, tmp_path):
    """The other one waits for it in the middle of its backward pass."""
    arguments = ["--num-gpus", "2", "--config-file", tiny_config, "OUTPUT_DIR", str(tmp_path)]
    env = {"FAULTS": '{"diverged": [1, 3]}'}
    output = run("tests/faults/faulty.py", "search_net.py", *arguments, env=env, status=2)
    words = "error: iteration 3: the loss or gradient of the weight step is not finite, Predicted"
    assert words in output and f"{tmp_path}/model_0000001.pth [rank 1]" in output
    saved = torch.load(tmp_path / "model_0000001.pth", weights_only=True)["model"]
    assert all(v.isfinite().all() for v in saved.values() if v.is_floating_point())


def test_stopped_while_its_ranks_wait_for_another_machine(tiny_config, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    arguments = ["--num-gpus", "1", "--num-machines", "2", "--dist-url", address]
    arguments += ["--config-file", tiny_config, "OUTPUT_DIR", str(tmp_path)]
    process = script("search_net.py", *arguments)
    sockets = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    # rank 0 listens
    wait_until(lambda: any(f":{port:04X} " in s.read_text() for s in sockets), process)
    process.send_signal(signal.SIGTERM)
    finish(process, status=75)
