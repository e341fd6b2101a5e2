import os
import re

import pytest

from detectron2.config import get_cfg
from detectron2_nats import NATSError
from detectron2_nats.files import (
    MAX_FILE_BYTES,
    read_yaml,
    write_atomically,
    write_yaml,
)


@pytest.fixture
def parse(tmp_path):
    def parse(text):
        path = tmp_path / "file.yaml"
        path.write_text(text, encoding="utf-8")
        return read_yaml(str(path))

    return parse


def test_plain_values(parse):
    text = "a: [1, 2.5, x, null, true]\nb: {c: -3}\n"
    assert parse(text) == {"a": [1, 2.5, "x", None, True], "b": {"c": -3}}


@pytest.mark.parametrize(
    "text, reason",
    [
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: !!python/tuple [1]", "could not determine a constructor"),
        ("a: !!bool maybe", "maybe"),
        ("a: 2001-99-99", ""),
        ("a: " + "9" * 5000, ""),
        ("a: 1\nb: 2\na: 3", "duplicate key"),
        ("x: {a: 1, a: 1}", "duplicate key"),
        ("? [1, 2]\n: 3", "unhashable"),
        ("a: [1, 2", ""),
        ("a: 1\n--- \nb: 2", "single document"),
        ("a: *nothing", ""),
        ("a: \x00", ""),
    ],
)
def test_not_plain_yaml(parse, text, reason):
    with pytest.raises(NATSError) as caught:
        parse(text)
    message = str(caught.value)
    assert re.fullmatch(r".*/file\.yaml: not readable as plain YAML: [^\n]{1,200}", message)
    assert reason in message


def test_detectron2s_own_dumps_are_readable(tmp_path):
    dump = get_cfg().dump()
    assert "*id001" in dump  # it writes aliases
    (tmp_path / "config.yaml").write_text(dump)
    assert (
        read_yaml(str(tmp_path / "config.yaml"))["MODEL"]["META_ARCHITECTURE"] == "GeneralizedRCNN"
    )


def test_files_that_cannot_be_read(tmp_path):
    cases = {"missing.yaml": "No such file", "": "Is a directory"}
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    cases["large.yaml"] = f"larger than the limit of {MAX_FILE_BYTES} bytes"
    (tmp_path / "binary.yaml").write_bytes(b"\x89PNG\xff\xfe\x00")
    cases["binary.yaml"] = "not a UTF-8 text file"
    (tmp_path / "nul.yaml").write_bytes(b"a: \x00\x01")
    cases["nul.yaml"] = "not readable as plain YAML"
    for name, reason in cases.items():
        path = str(tmp_path / name)
        with pytest.raises(NATSError) as caught:
            read_yaml(path)
        assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value)
        assert "\n" not in str(caught.value)


def test_file_at_the_size_limit_is_read(tmp_path):
    (tmp_path / "f.yaml").write_bytes(b"a: 1\n#" + b"-" * (MAX_FILE_BYTES - 6))
    assert read_yaml(str(tmp_path / "f.yaml")) == {"a": 1}


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs an endless file")
def test_file_without_a_size_is_bounded():
    with pytest.raises(NATSError, match="/dev/zero: larger than"):
        read_yaml("/dev/zero")


def test_write_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "new" / "folder" / "f.txt"
    write_atomically(str(path), "first\n")
    assert path.read_text() == "first\n"
    write_atomically(str(path), lambda file: file.write(b"\x00second"))
    assert path.read_bytes() == b"\x00second"
    assert os.listdir(path.parent) == ["f.txt"]


def test_write_to_a_bare_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_atomically("f.txt", "α\n")
    assert (tmp_path / "f.txt").read_text(encoding="utf-8") == "α\n"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "f.txt"
    path.write_text("old")

    def fail(file):
        file.write(b"half of the new")
        file.flush()
        raise error

    with pytest.raises(type(error)):
        write_atomically(str(path), fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f.txt"]


def test_failed_rename_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f.txt"
    path.write_text("old")

    def fail(source, target):
        assert (tmp_path / source).read_text() == "new"  # whole before it is renamed
        raise OSError("no rename")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no rename"):
        write_atomically(str(path), "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f.txt"]


def test_tuples_are_written_on_one_line_and_repeated_values_in_full(tmp_path):
    path, pairs = tmp_path / "f.yaml", ((1, 1), [3, 3])
    write_yaml(str(path), {"a": pairs, "b": [pairs] * 40}, "# a comment\n")
    assert path.read_text().startswith("# a comment\na: [[1, 1], [3, 3]]\nb:\n- [[1, 1], [3, 3]]\n")
    assert read_yaml(str(path)) == {"a": [[1, 1], [3, 3]], "b": [[[1, 1], [3, 3]]] * 40}
