"""Read files from strangers and write our own: safe YAML of bounded size, atomic writes."""

import math
import os
import tempfile
from typing import IO, Any, Callable, Mapping, Union

import yaml

from .errors import NATSError

MAX_FILE_BYTES = 8 * 2**20
"""Size limit of a config or architecture file. No more bytes are read."""


class _StrictLoader(yaml.SafeLoader):  # libyaml's dies of a hundred thousand open brackets
    """Loads plain values only, and refuses duplicate keys."""

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep=deep)
        if isinstance(node, yaml.MappingNode) and len(mapping) < len(node.value):
            raise yaml.YAMLError(f"duplicate key, near line {node.start_mark.line + 1}")
        return mapping


class _Dumper(yaml.SafeDumper):
    """Writes repeated values in full, and a tuple on one line with everything in it."""

    def ignore_aliases(self, data):
        return True

    def represent_tuple(self, values):
        return self.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_Dumper.add_representer(tuple, _Dumper.represent_tuple)


def read_bounded(path: str) -> bytes:
    """Read a file of at most :data:`MAX_FILE_BYTES`.

    Raises:
        NATSError: the file is missing, a folder, or too large; names the file.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise NATSError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise NATSError(f"{path}: larger than the limit of {MAX_FILE_BYTES} bytes")
    return data


def read_yaml(path: str) -> Any:
    """Read a YAML file of plain values and at most :data:`MAX_FILE_BYTES`.

    Raises:
        NATSError: the file is missing, a folder, too large, not text, or not plain YAML; one line
            that names it.
    """
    data = read_bounded(path)
    try:
        return yaml.load(data.decode("utf-8"), Loader=_StrictLoader)
    except UnicodeDecodeError:
        raise NATSError(f"{path}: not a UTF-8 text file") from None
    except Exception as error:  # the constructors of `!!bool x` etc. raise all kinds of errors
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise NATSError(f"{path}: not readable as plain YAML: {reason}") from None


def write_atomically(path: str, content: Union[str, Callable[[IO[bytes]], Any]]) -> None:
    """Write a file under another name in the same folder, flush it to the disk, and rename it.

    A kill or a full disk in the middle leaves the old file unchanged. Missing folders are made.

    Args:
        content: text, or a function that writes to the open binary file.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.")
    try:
        with os.fdopen(handle, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


def write_yaml(path: str, content: Mapping[str, Any], comment: str = "") -> None:
    """Write plain values in their order, for :func:`read_yaml`; each tuple on one line.

    Args:
        comment: lines at the top, each with a "#".
    """
    text = comment + yaml.dump(
        content, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=math.inf
    )
    write_atomically(path, text)
