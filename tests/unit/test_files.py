import os
import re

import pytest

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


@pytest.mark.parametrize(
    "text, reason",
    [
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: !!python/tuple [1]", "could not determine a constructor"),
        ("a: !!bool maybe", "maybe"),
        ("a: 1\nb: 2\na: 3", "duplicate key"),
        ("? [1, 2]\n: 3", "unhashable"),
        ("a: [1, 2", ""),
        ("a: 1\n--- \nb: 2", "single document"),
        ("a: &x [1]\nb: [" + "*x, " * 31 + "]", "more than 30 aliases"),
        ("a: '" + "x" * 70000 + "'", "more than 65536 characters"),
    ],
)
def test_not_plain_yaml(parse, text, reason):
    with pytest.raises(NATSError) as caught:
        parse(text)
    message = str(caught.value)
    assert re.fullmatch(r".*/file\.yaml: not readable as plain YAML: [^\n]{1,200}", message)
    assert reason in message


def test_aliases_of_aliases_are_bounded(parse):
    bomb = ["a0: &a0 [1]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    with pytest.raises(NATSError, match="more than 30 aliases"):
        parse("\n".join(bomb))
    assert parse("\n".join(bomb[:4]))["a3"] == [[[[1]] * 9] * 9] * 9


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
