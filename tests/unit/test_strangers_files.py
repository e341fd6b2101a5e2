"""Malformed architecture files and configs, 2,300 of them: one line of error, or they load."""

import os
import signal
import threading
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import TINY

from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2_nats import Architecture, NATSError, add_nats_config
from detectron2_nats.config import load_config

ARCHITECTURE = """\
format: detectron2-nats/1
layers:
  res3.0.conv2: [[64, 1, 1], [32, 1, 3], [32, 3, 3]]
  res3.1.conv2: [[128, 1, 1]]
  res5.0.conv1: [[1, 5, 1], [2, 1, 5], [253, 1, 1]]
search: {space: C, num_groups: 16, order: paper, iteration: 256500, seed: 7}
"""
SECONDS = 5  # each is done in milliseconds


class Hang(BaseException):
    """Not an Exception, which a reader might take for the file's fault."""


def check(read):
    """It loads, or raises NATSError of one line, and soon."""

    def hang(number, frame):
        raise Hang

    in_main = threading.current_thread() is threading.main_thread()
    if in_main:
        before = signal.signal(signal.SIGALRM, hang)
        signal.alarm(SECONDS + 5)
    start = time.monotonic()
    try:
        return read()
    except NATSError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and len(message) < 2000, message
    finally:
        if in_main:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        assert time.monotonic() - start < SECONDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("strangers")


@pytest.fixture(scope="module")
def marker(folder):
    """A file that code in a payload would make; it must never be there."""
    path = folder / "code_was_run"
    yield path
    assert not path.exists()


MARKER = "@MARKER@"
PAYLOADS = [
    f'!!python/object/apply:os.system ["touch {MARKER}"]',
    f'!!python/object/apply:subprocess.check_call [["touch", "{MARKER}"]]',
    f'!!python/object/new:os.system ["touch {MARKER}"]',
    f"!!python/object/apply:builtins.eval [\"open('{MARKER}', 'w')\"]",
    f'!!python/object/apply:builtins.open ["{MARKER}", "w"]',
    f'!<tag:yaml.org,2002:python/object/apply:os.system> ["touch {MARKER}"]',
    f"__import__('os').system('touch {MARKER}')",
    f"eval:open('{MARKER}', 'w')",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/tuple [1, 2]",
    "!!binary AAAA=",
    "!!binary '*'",
    "!!bool maybe",
    "!!set {a, b}",
    "!!omap [a: 1, 3]",
    "!!pairs [1]",
    "!!timestamp 2001-99-99",
    "2001-99-99",
    "2001-01-01",
    "!!int ''",
    "!!int 0b",
    "!!float x",
    "!!null 1",
    "!mine {a: 1}",
    "*nothing",
    "&x [*x]",
    "&x {a: *x}",
    "{<<: [1]}",
    "{<<: {a: 1}, a: 2}",
    "? [1, 2]\n: 3",
    "9" * 5000,
    "-" + "9" * 400,
    "1:" * 3000 + "1",
    "1e999999",
    ".inf",
    ".nan",
    "0x" + "f" * 5000,
    "'" + "x" * 70000 + "'",
    '"\\x00"',
    '"\\ud800"',
    '"a\\nb\\u2028c\\x85d"',
    "\ufeff",
    "%YAML 9.9\n---\n",
    "%TAG ! tag:yaml.org,2002:python/\n--- !object/apply:os.getcwd []",
    "---\na: 1\n---\nb: 2",
    "a0: &a [1]\n"
    + "\n".join(
        f"a{i}: &a{i} [{'*a, ' * 9}]".replace("*a,", f"*a{i - 1}," if i > 1 else "*a,")
        for i in range(1, 9)
    ),
    "_BASE_: nowhere.yaml",
    "_BASE_: config.yaml",  # itself
    "_BASE_: [config.yaml]",
    "_BASE_: /dev/zero",
    "_BASE_: http://127.0.0.1:9/a.yaml",
    "_BASE_: ~nobody/a.yaml",
    "_BASE_: model_zoo://a.yaml",
    "VERSION: 0",
    "VERSION: 1",
    "VERSION: x",
    "VERSION: [2]",
    "VERSION: 99",
    "lambda:" * 3000 + "1",
    "'" + "-" * 60000 + "1'",
    "-" * 100000 + "1",
]
NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**300, -(10**300), 65536, 65537]),
    st.floats(),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.text(max_size=20),
    st.binary(max_size=8),
    st.dates(),
    st.sampled_from(["res3.0.conv2", "res3", "format", "layers", "[", "1, 2", "(1,", "{}", "%"]),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.one_of(st.text(max_size=8), st.integers(), st.none()), inner, max_size=4)
    | st.lists(inner, max_size=4).map(tuple),
    max_leaves=12,
)


@st.composite
def nested(draw):
    opening, closing = draw(st.sampled_from([("[", "]"), ("{a: ", "}"), ("- ", ""), ("((", "))")]))
    depth = draw(st.integers(1, 5000))
    return opening * depth + draw(st.sampled_from(["", closing * depth]))


FRAGMENTS = st.one_of(st.sampled_from(PAYLOADS), nested(), st.text(max_size=30))


@st.composite
def edited(draw, text):
    """`text` with some pieces deleted, doubled, or replaced by something hostile."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 30)))
        piece = draw(st.one_of(st.just(""), st.just(text[start:end] * 2), FRAGMENTS))
        text = text[:start] + piece + text[end:]
    return text


@st.composite
def mutated(draw, text):
    """The YAML `text` with the values at some places replaced by random trees."""
    tree = yaml.safe_load(text)
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if not isinstance(node[key], (dict, list)) or draw(st.integers(0, 3)) == 0:
                node[key] = draw(TREES)
                break
            node = node[key]
    return dump(tree)


def dump(tree) -> str:
    """As YAML; what is not plain becomes a Python tag."""
    return yaml.dump(tree, allow_unicode=True)


def files(text):
    """Bytes of a malformed file that is more or less like the valid `text`."""
    texts = st.one_of(edited(text), mutated(text), TREES.map(dump), FRAGMENTS)
    return st.one_of(
        texts.map(lambda t: t.encode("utf-8", "surrogatepass")),
        st.binary(max_size=200),
        st.tuples(st.integers(0, len(text)), st.binary(max_size=9)).map(
            lambda cut: text.encode()[: cut[0]] + cut[1]
        ),
    )


def flat_keys(node: CfgNode, prefix: str = ""):
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from flat_keys(value, f"{prefix}{key}.")


CONFIG = get_cfg()
add_nats_config(CONFIG)
KEYS = sorted(flat_keys(CONFIG))
ARCHITECTURE_TREE = [list(item) for item in yaml.safe_load(ARCHITECTURE)["layers"].items()]


def many(count):
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def write(path, content: bytes, marker) -> str:
    path.write_bytes(content.replace(MARKER.encode(), str(marker).encode()))
    return str(path)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_each_payload_in_each_place(folder, marker, payload):
    contents = [payload, f"layers: {payload}", f"MODEL: {payload}", f"OUTPUT_DIR: {payload}"]
    contents += [f"{payload}: 1", f"a: [{payload}]", f"MODEL:\n  WEIGHTS: {payload}\n"]
    for content in contents:
        path = write(folder / "config.yaml", content.encode("utf-8", "surrogatepass"), marker)
        check(lambda: Architecture.load(path))
        check(lambda: load_config(path))
    payload = payload.replace(MARKER, str(marker))
    for opts in (["OUTPUT_DIR", payload], [payload, "1"], ["MODEL", payload], [payload]):
        check(lambda: load_config("", opts))
    check(lambda: load_config("", ["MODEL.NATS.ARCHITECTURE", payload]))
    assert not marker.exists()


def test_no_path_leads_out_of_the_zoo(folder, marker, monkeypatch):
    """Zoo configs are read unsafely, as Detectron2 reads its own: nothing else may pass for one."""
    path = write(folder / "evil.yaml", PAYLOADS[0].encode(), marker)
    deep = folder.joinpath(*"abcdefghijklmnopqrstuvwxyz")  # from here the path leads nowhere
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    zoo = os.path.join(os.path.dirname(model_zoo.__file__), "configs")
    for name in (os.path.relpath(path, zoo), os.path.join("COCO-Detection", "..", "..", "a.yaml")):
        with pytest.raises(NATSError, match="neither a file nor the name of a config in"):
            load_config(name)
    assert not marker.exists()
    assert load_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml").MODEL.RETINANET.NUM_CLASSES


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_base_that_is_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "pipe")
    (folder / "config.yaml").write_text("_BASE_: pipe")
    with pytest.raises(NATSError, match="_BASE_ .*pipe is not a file"):
        load_config(str(folder / "config.yaml"))


@many(700)
@given(content=files(ARCHITECTURE))
def test_architecture_files(folder, marker, content):
    path = write(folder / "architecture.yaml", content, marker)
    loaded = check(lambda: Architecture.load(path))
    assert loaded is None or isinstance(loaded, Architecture)
    assert not marker.exists()


@st.composite
def architecture_values(draw):
    value = [[name, [list(run) for run in runs]] for name, runs in ARCHITECTURE_TREE]
    entry = draw(st.integers(0, len(value) - 1))
    place = draw(st.integers(0, 4))
    junk = draw(TREES)
    if place == 0:
        return junk
    if place == 1:
        value[entry] = junk
    elif place == 2:
        value[entry][draw(st.integers(0, 1))] = junk
    elif place == 3:
        value[entry][1][0] = junk
    else:
        value[entry][1][0][draw(st.integers(0, 2))] = junk
    return value


@many(500)
@given(value=architecture_values())
def test_architecture_values(value):
    check(lambda: Architecture.from_config(value))


@st.composite
def fragments_of_real_keys(draw):
    """A config in which real keys have values of any kind."""
    tree = {}
    for key in draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3)):
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                return dump({key: draw(TREES)})
        node[last] = draw(TREES)
    return dump(tree)


CONFIG_FILES = st.one_of(
    files(TINY),
    fragments_of_real_keys().map(lambda text: text.encode("utf-8", "surrogatepass")),
)


@many(700)
@given(content=CONFIG_FILES)
def test_config_files(folder, marker, content):
    path = write(folder / "config.yaml", content, marker)
    loaded = check(lambda: load_config(path))
    assert loaded is None or isinstance(loaded, CfgNode)
    assert not marker.exists()


OPTIONS = st.lists(
    st.one_of(
        st.sampled_from(KEYS),
        st.sampled_from(PAYLOADS),
        TREES.map(repr),
        TREES,
        nested(),
        st.text(max_size=20),
    ),
    max_size=4,
) | st.tuples(st.sampled_from(KEYS), st.one_of(TREES.map(repr), FRAGMENTS)).map(list)


@many(400)
@given(opts=OPTIONS)
def test_config_options(folder, marker, opts):
    opts = [o.replace(MARKER, str(marker)) if isinstance(o, str) else o for o in opts]
    loaded = check(lambda: load_config("", opts))
    assert loaded is None or isinstance(loaded, CfgNode)
    assert not marker.exists()
