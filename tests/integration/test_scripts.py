"""The scripts themselves, as a user starts them."""

import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from runs import assert_same_run, finish, printed, run, script, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detectron2.config import get_cfg
from detectron2.modeling import build_model

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")


def wait_for(path: Path, process) -> None:
    """Until the file is there."""
    wait_until(path.exists, process)


def wait_for_text(text: str, process) -> None:
    """Until the process has printed it."""
    wait_until(lambda: text in printed(process), process)


@pytest.fixture(scope="module")
def undisturbed(tiny_config, tmp_path_factory) -> Path:
    """A search of 6 iterations that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run("search_net.py", "--config-file", tiny_config, "OUTPUT_DIR", str(folder), fresh=True)
    return folder


@pytest.fixture(scope="module")
def undisturbed_pair(tiny_config, tmp_path_factory) -> Path:
    """The same on two gloo processes."""
    folder = tmp_path_factory.mktemp("pair")
    arguments = ["--num-gpus", "2", "--config-file", tiny_config]
    run("search_net.py", *arguments, "OUTPUT_DIR", str(folder), fresh=True)
    return folder


def test_search_export_retrain_evaluate(undisturbed, tiny_config, tmp_path):
    # the search's own export
    retrain = undisturbed / "retrain.yaml"
    content = yaml.safe_load(retrain.read_text())
    assert content["MODEL"]["BACKBONE"]["NAME"] == "build_nats_backbone"
    assert "SEARCH" not in content and "CALIBRATION" not in content["DATASETS"]
    # another detector, by the tool
    retinanet = tmp_path / "retinanet.yaml"
    base = tmp_path / "base.yaml"
    base.write_text(
        f"_BASE_: {tiny_config}\n"
        "MODEL:\n"
        "  META_ARCHITECTURE: RetinaNet\n"
        "  BACKBONE: {NAME: build_retinanet_resnet_fpn_backbone}\n"
        "  RESNETS: {OUT_FEATURES: [res3, res4, res5]}\n"
        "  FPN: {IN_FEATURES: [res3, res4, res5]}\n"
        "  RETINANET: {NUM_CLASSES: 5, IN_FEATURES: [p3, p4, p5, p6, p7], NUM_CONVS: 1}\n"
    )
    arguments = [str(undisturbed), "--config-file", str(base), "--output", str(retinanet)]
    output = run("nats-export", *arguments)
    assert f"wrote {retinanet}" in output
    for config in (retrain, retinanet):
        folder = tmp_path / config.stem
        arguments = ["--config-file", str(config), "OUTPUT_DIR", str(folder)]
        arguments += ["DATASETS.TEST", "('nats_embedded_val',)"]
        out = run("train_net.py", *arguments, "SOLVER.MAX_ITER", "3")
        assert "Evaluation results for nats_embedded_val" in out
    arguments += ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
    out = run("train_net.py", "--eval-only", *arguments)
    assert "Evaluation results for nats_embedded_val" in out
    arguments[1] = str(base)  # the weights fit the plain network, too
    out = run("train_net.py", "--eval-only", *arguments, status=2)
    assert f"{folder}/model_final.pth was trained with other dilations than the config has" in out


def test_frozen_weights_from_the_supernetwork(undisturbed, tmp_path):
    weights, config = tmp_path / "frozen.pth", tmp_path / "frozen.yaml"
    output = run("nats-export", str(undisturbed), "--weights", str(weights), status=2)
    assert "fit only an architecture in voted order" in output
    arguments = ["--order", "voted", "--weights", str(weights), "--output", str(config)]
    output = run("nats-export", str(undisturbed), *arguments)
    assert f"wrote {weights}" in output and f"wrote {config}" in output

    # in another project: the config, the weights and the package are enough
    import detectron2_nats

    cfg = get_cfg()
    detectron2_nats.add_nats_config(cfg)
    cfg.merge_from_file(str(config), allow_unsafe=False)
    model = build_model(cfg)
    frozen = torch.load(weights, weights_only=True)["model"]
    assert frozen.keys() == model.state_dict().keys()
    model.load_state_dict(frozen)
    saved = torch.load(undisturbed / "model_final.pth", weights_only=True)["model"]
    space = {(1, 1): 0, (3, 3): 1, (5, 5): 2}
    seen = set()
    for name, runs in cfg.MODEL.NATS.ARCHITECTURE:
        key, start = f"backbone.bottom_up.{name}", 0
        for channels, *dilation in runs:
            rows, replica = slice(start, start + channels), space[tuple(dilation)]
            expected = saved[f"{key}.replicas"][replica - 1] if replica else saved[f"{key}.weight"]
            assert torch.equal(frozen[f"{key}.weight"][rows], expected[rows])
            seen.add(replica)
            start += channels
    assert len(seen) > 1  # else nothing was tested


def test_survives_sigkill(undisturbed, tiny_config, tmp_path):
    """Two processes: test_two_processes_go_on_after_a_stop_and_after_a_kill."""
    arguments = ["--config-file", tiny_config, "--resume", "OUTPUT_DIR", str(tmp_path)]
    arguments += ["DATALOADER.NUM_WORKERS", "2"]
    process = script("search_net.py", *arguments, start_new_session=True)
    wait_for(tmp_path / "model_0000001.pth", process)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    output = run("search_net.py", *arguments)
    assert re.search(r"Starting training from iteration [24]", output)
    assert_same_run(undisturbed, tmp_path)


def test_goes_on_with_as_many_threads(undisturbed, tiny_config, tmp_path):
    """Left to itself, the second start would take one for each core."""
    arguments = ["--config-file", tiny_config, "--resume", "OUTPUT_DIR", str(tmp_path)]
    process = script("search_net.py", *arguments)
    wait_for(tmp_path / "model_0000001.pth", process)
    process.kill()
    process.wait()
    output = run("search_net.py", *arguments, env={"OMP_NUM_THREADS": None}, fresh=True)
    assert "not bit for bit" not in output
    assert_same_run(undisturbed, tmp_path)


def gone(pid: int) -> bool:
    """Dead, or waiting for its exit status to be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def killed_alone(launcher) -> None:
    """Kill it, and see that its two ranks die."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranks = [
        int(pid)
        for pid in children
        if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(ranks) == 2
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
            if not gone(rank):
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
    finish(script("search_net.py", *arguments))
    assert_same_run(undisturbed_pair, tmp_path)


def test_ranks_die_with_torchrun(tiny_config, tmp_path):
    """How they go on: test_torchrun_restarts_after_a_rank_died."""
    arguments = ["--config-file", tiny_config, "OUTPUT_DIR", str(tmp_path)]
    process = script("search_net.py", *arguments, launcher=TORCHRUN)
    wait_for(tmp_path / "model_0000001.pth", process)
    killed_alone(process)


def test_a_second_run_in_the_folder_of_a_living_one_is_refused(tiny_config, tmp_path):
    arguments = ["--config-file", tiny_config, "--resume", "OUTPUT_DIR", str(tmp_path)]
    arguments += ["SOLVER.MAX_ITER", "1000000"]
    process = script("search_net.py", *arguments)
    wait_for(tmp_path / "model_0000001.pth", process)
    config = (tmp_path / "config.yaml").stat().st_mtime_ns
    process.send_signal(signal.SIGSTOP)  # ten seconds' computing less
    output = run("search_net.py", *arguments, status=2)
    assert f"error: {tmp_path} is in use by another run, process {process.pid} on " in output
    assert (tmp_path / "config.yaml").stat().st_mtime_ns == config
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    finish(process, status=75)


def test_interrupted_twice_leaves_at_once(tiny_config, tmp_path):
    arguments = ["--config-file", tiny_config, "OUTPUT_DIR", str(tmp_path)]
    opts = ["SOLVER.MAX_ITER", "1000000", "SOLVER.CHECKPOINT_PERIOD", "1000000"]
    process = script("search_net.py", *arguments, *opts)
    wait_for(tmp_path / "metrics.json", process)
    process.send_signal(signal.SIGSTOP)  # both arrive in the same step
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert process.returncode in (75, 130)  # 75: a step ended between the two


def test_pictures_are_in_tensorboard(undisturbed):
    events = EventAccumulator(str(undisturbed), size_guidance={"images": 0})
    events.Reload()
    for name in ("alpha/architecture", "alpha/history"):
        assert len(events.Images(name)) >= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stops_on_request(undisturbed, tiny_config, tmp_path, number):
    arguments = ["--config-file", tiny_config, "--resume", "OUTPUT_DIR", str(tmp_path)]
    process = script("search_net.py", *arguments)
    wait_for(tmp_path / "model_0000001.pth", process)
    process.send_signal(number)
    output = finish(process, status=75)
    assert "stopped on request after iteration" in output
    if number == signal.SIGTERM:  # all set the same flag
        run("search_net.py", *arguments)
        assert_same_run(undisturbed, tmp_path)


@pytest.mark.parametrize("processes", [1, 2])
def test_stops_in_the_middle_of_an_evaluation(undisturbed, tiny_config, tmp_path, processes):
    """Schedulers signal whole process groups: loader processes too."""
    arguments = ["--num-gpus", str(processes), "--config-file", tiny_config, "--resume"]
    arguments += ["OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", "1"]
    # no checkpoint of its own stands at the evaluation
    period = ["SOLVER.CHECKPOINT_PERIOD", "100", "TEST.EVAL_PERIOD", "3"]
    tests = ["DATASETS.TEST", "('nats_embedded_val',)"]
    process = script("search_net.py", *arguments, *period, *tests, start_new_session=True)
    wait_for_text("Start inference on", process)
    os.killpg(process.pid, signal.SIGTERM)
    output = finish(process, status=75)
    assert "stopped on request, in the middle of an evaluation" in output
    assert "Evaluation results" not in output
    assert processes == 2 or "Traceback" not in output  # a rank may find its connection cut
    assert (tmp_path / "model_0000002.pth").exists()
    if processes == 1:
        run("search_net.py", *arguments)
        assert_same_run(undisturbed, tmp_path)


def test_evaluation_alone_stops_on_request(undisturbed, tiny_config, tmp_path):
    arguments = ["--eval-only", "--config-file", tiny_config, "OUTPUT_DIR", str(tmp_path)]
    arguments += ["MODEL.WEIGHTS", str(undisturbed / "model_final.pth")]
    process = script("search_net.py", *arguments, "DATASETS.TEST", "('nats_embedded_val',)")
    wait_for_text("Start inference on", process)
    process.send_signal(signal.SIGINT)
    assert "stopped on request" in finish(process, status=75)


def test_two_machines(undisturbed_pair, tiny_config, tmp_path):
    """A launcher for each, here both on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    arguments = ["--num-gpus", "1", "--num-machines", "2", "--dist-url", address]
    opts = ["--config-file", tiny_config, "OUTPUT_DIR", str(tmp_path)]
    machines = [
        script("search_net.py", *arguments, "--machine-rank", str(rank), *opts) for rank in (0, 1)
    ]
    for machine in machines:
        finish(machine)
    assert_same_run(undisturbed_pair, tmp_path)


def test_torchrun_restarts_after_a_rank_died(undisturbed_pair, tiny_config, tmp_path):
    arguments = ["--config-file", tiny_config, "--resume", "OUTPUT_DIR", str(tmp_path)]
    launcher = (*TORCHRUN, "--max-restarts", "2")
    process = script("search_net.py", *arguments, launcher=launcher)
    wait_for(tmp_path / "model_0000001.pth", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    output = finish(process)
    assert re.search(r"Starting training from iteration [1-9]", output)
    assert_same_run(undisturbed_pair, tmp_path)


# what torchrun says to a worker, which then starts as if torchrun had started it
A_WORKER = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}


def test_torchrun_restarts_only_what_may_resume(tiny_config, tmp_path):
    """A restart of what was refused in the folder of an earlier run must not take that run over."""
    arguments = ["--config-file", tiny_config, "OUTPUT_DIR", str(tmp_path)]
    env = {**A_WORKER, "TORCHELASTIC_MAX_RESTARTS": "1"}
    output = run("search_net.py", *arguments, env=env, status=2)
    assert "error: torchrun --max-restarts also needs --resume" in output
    assert not list(tmp_path.iterdir())


def test_config_yaml_stays_what_made_the_checkpoints(undisturbed, tiny_config, tmp_path):
    """Exports and scores rely on it."""
    config, arguments = undisturbed / "config.yaml", ["--config-file", tiny_config]
    arguments += ["OUTPUT_DIR", str(undisturbed)]
    before = config.read_text()
    output = run("search_net.py", *arguments, "MODEL.NATS.SPACE", "B", status=2)
    assert "contains checkpoints of an earlier run" in output
    output = run("search_net.py", "--resume", *arguments, "MODEL.NATS.SPACE", "B", status=2)
    assert "a search with other settings: MODEL.NATS.SPACE: 'A', now 'B'" in output
    opts = ["DATASETS.TEST", "('nats_embedded_val',)", "TEST.DETECTIONS_PER_IMAGE", "1"]
    opts += ["MODEL.WEIGHTS", str(undisturbed / "model_final.pth")]
    run("search_net.py", "--eval-only", *arguments, *opts)
    assert config.read_text() == before
    run("search_net.py", "--resume", *arguments, "SOLVER.CHECKPOINT_PERIOD", "3")
    assert config.read_text() == before.replace("CHECKPOINT_PERIOD: 2", "CHECKPOINT_PERIOD: 3")
    config.write_text(before)


def test_stopped_while_its_ranks_wait_for_another_machine(tiny_config, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    arguments = ["--num-gpus", "1", "--num-machines", "2", "--dist-url", address]
    arguments += ["--config-file", tiny_config, "OUTPUT_DIR", str(tmp_path)]
    process = script("search_net.py", *arguments, fresh=True)  # forks inherit how it takes signals
    port = f":{int(address.rpartition(':')[2]):04X} "
    sockets = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    wait_until(lambda: any(port in s.read_text() for s in sockets), process)  # rank 0 listens
    process.send_signal(signal.SIGTERM)
    finish(process, status=75)


def test_a_damaged_newest_checkpoint_is_passed_over(undisturbed, tiny_config, tmp_path):
    arguments = ["--config-file", tiny_config, "--resume", "OUTPUT_DIR", str(tmp_path)]
    process = script("search_net.py", *arguments)
    wait_for(tmp_path / "model_0000003.pth", process)
    process.kill()
    process.wait()
    (tmp_path / "model_final.pth").unlink(missing_ok=True)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    newest = tmp_path / "model_0000003.pth"
    newest.write_bytes(newest.read_bytes()[:-1000])
    output = finish(script("search_net.py", *arguments))
    assert f"checkpoint {newest} is damaged" in output
    assert "Starting training from iteration 2" in output
    assert_same_run(undisturbed, tmp_path)


def test_errors_are_one_line_with_status_2(tiny_config, tmp_path):
    arguments = ["--config-file", tiny_config, "OUTPUT_DIR", str(tmp_path)]
    output = run("search_net.py", *arguments, "MODEL.NATS.SPACE", "Z", status=2, fresh=True)
    assert output.strip().splitlines()[-1].startswith("error: unknown SPACE 'Z'")
    assert "Traceback" not in output


def test_errors_of_several_processes_are_the_last_lines(tiny_config, tmp_path):
    arguments = ["--num-gpus", "2", "--config-file", tiny_config, "OUTPUT_DIR", str(tmp_path)]
    output = run("search_net.py", *arguments, "MODEL.NATS.SPACE", "Z", status=2)
    assert output.strip().splitlines()[-1].startswith("error: unknown SPACE 'Z'")
    assert "Traceback" not in output


def test_no_process_computes_on_the_cpu_unasked(tiny_config, tmp_path):
    arguments = ["--config-file", tiny_config, "OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cuda"]
    env = {"CUDA_VISIBLE_DEVICES": ""}
    for more, worker in (["--num-gpus", "2"], {}), ([], A_WORKER):
        output = run("search_net.py", *more, *arguments, env={**env, **worker}, status=2)
        assert "error: processes on this machine: 2, GPUs that PyTorch can use here: 0 (" in output
    output = run("search_net.py", *arguments, "SOLVER.MAX_ITER", "1", env=env)
    words = "computing on the CPU, because PyTorch finds no GPU: (Runtime|Assertion)Error: "
    assert re.search(words, output)


def test_a_checkpoint_before_the_first_line_of_the_log(tiny_config, tmp_path):
    arguments = ["--config-file", tiny_config, "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "1"]
    output = run("search_net.py", *arguments, "RUN.LOG_PERIOD", "100")
    assert "no pictures" not in output


@pytest.mark.parametrize("name", ["search", "train"])
def test_help_has_an_example(name):
    output = run(f"{name}_net.py", "--help")
    assert "example" in output and f"$ nats-{name}" in output
