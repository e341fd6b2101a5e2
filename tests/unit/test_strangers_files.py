"""Malformed architecture files and configs: one line of error, or they load; no code is run."""

import os
import time

import pytest

from detectron2 import model_zoo
from detectron2_nats import Architecture, NATSError
from detectron2_nats.config import load_config

MARKER = "@MARKER@"  # a file that code in a payload would make
PAYLOADS = [
    f'!!python/object/apply:os.system ["touch {MARKER}"]',
    f"!!python/object/apply:builtins.eval [\"open('{MARKER}', 'w')\"]",
    f"__import__('os').system('touch {MARKER}')",
    f"eval:open('{MARKER}', 'w')",
    "!!binary '*'",
    "2001-99-99",
    "&x [*x]",
    "? [1, 2]\n: 3",
    "1:" * 3000 + "1",
    "0x" + "f" * 5000,
    '"a\\nb\\u2028c\\x85d"',
    '"\\ud800"',
    "{a: " * 5000,
    "_BASE_: config.yaml",  # itself
    "_BASE_: /dev/zero",
    "VERSION: [2]",
    "'" + "-" * 60000 + "1'",
]
SECONDS = 5  # each is done in milliseconds


def check(read):
    """It loads, or raises NATSError of one line, and soon."""
    start = time.monotonic()
    try:
        read()
    except NATSError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: payload[:20])
def test_each_payload_in_each_place(tmp_path, payload):
    marker, path = tmp_path / "code_was_run", tmp_path / "config.yaml"
    payload = payload.replace(MARKER, str(marker))
    head = "format: detectron2-nats/1\n"
    contents = [payload, f"{head}layers: {payload}", f"MODEL: {payload}", f"{payload}: 1"]
    contents += [f"{head}layers: {{res3.0.conv2: {payload}}}", f"MODEL: {{NATS: {payload}}}"]
    contents += [f"MODEL: {{NATS: {{STAGES: {payload}}}}}", f"MODEL:\n  WEIGHTS: {payload}\n"]
    for content in contents:
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        check(lambda: Architecture.load(str(path)))
        check(lambda: load_config(str(path)))
    for opts in (["OUTPUT_DIR", payload], [payload, "1"], ["MODEL", payload], [payload]):
        check(lambda: load_config("", opts))
    for key in ("ARCHITECTURE", "CONVS", "STAGES"):
        check(lambda: load_config("", [f"MODEL.NATS.{key}", payload]))
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"\x80\x02}q\x00.", b"\xff\xfe", b"a: \x00", b""])
def test_files_that_are_no_text(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    for read in (Architecture.load, load_config):
        with pytest.raises(NATSError, match=f"^{tmp_path}/config.yaml: "):
            read(str(tmp_path / "config.yaml"))


def test_no_path_leads_out_of_the_zoo(tmp_path, monkeypatch):
    """Zoo configs are read unsafely, as Detectron2 reads its own: nothing else may pass for one."""
    marker, path = tmp_path / "code_was_run", tmp_path / "evil.yaml"
    path.write_text(PAYLOADS[0].replace(MARKER, str(marker)))
    deep = tmp_path.joinpath(*"abcdefghijklmnopqrstuvwxyz")  # from here the path leads nowhere
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    zoo = os.path.join(os.path.dirname(model_zoo.__file__), "configs")
    for name in (os.path.relpath(path, zoo), os.path.join("COCO-Detection", "..", "..", "a.yaml")):
        with pytest.raises(NATSError, match="neither a file nor the name of a config in"):
            load_config(name)
    assert not marker.exists()
    assert load_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml").MODEL.RETINANET.NUM_CLASSES
