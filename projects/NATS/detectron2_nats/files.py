"""Read files from strangers and write our own: safe YAML of bounded size, atomic writes."""

import math
import os
import tempfile
from typing import IO, Any, Callable, Mapping, Union

import yaml

from .errors import NATSError

MAX_FILE_BYTES = 8 * 2**20
"""Size limit of a config or architecture file. No more bytes are read."""

_MAX_DEPTH = 50
_MAX_SCALAR = 2**16
_MAX_ALIASES = 30  # Detectron2's dumps have a few


class _StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Loads plain values only, and refuses duplicate keys."""

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep=deep)
        if isinstance(node, yaml.MappingNode) and len(mapping) < len(node.value):
            raise yaml.YAMLError(f"duplicate key, near line {node.start_mark.line + 1}")
        return mapping


def _check_events(text: str, max_aliases: int) -> None:
    """Refuse a text that would cost much more time, stack or memory than its size suggests.

    libyaml's composer dies of a hundred thousand open brackets. PyYAML reads "1:1:1:…", a number in
    base 60, in quadratic time. Aliases of many aliases make a small file large when it is printed.
    """
    depth = aliases = 0
    for event in yaml.parse(text, Loader=_StrictLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {_MAX_DEPTH} deep")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > _MAX_SCALAR:
            raise yaml.YAMLError(f"a value of more than {_MAX_SCALAR} characters")
        if aliases > max_aliases:
            reason = (
                f"more than {max_aliases} aliases" if max_aliases else "aliases are not allowed"
            )
            raise yaml.YAMLError(reason)


def parse_yaml(text: str, name: str, *, aliases: bool = True) -> Any:
    """Parse YAML of plain values.

    Args:
        name: of the file, for the message.
        aliases: allow a few. Detectron2 writes them into its config dumps.

    Raises:
        NATSError: anything is wrong with the text; one line that names the file.
    """
    try:
        _check_events(text, _MAX_ALIASES if aliases else 0)
        return yaml.load(text, Loader=_StrictLoader)
    except Exception as error:  # the constructors of `!!bool x` etc. raise all kinds of errors
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise NATSError(f"{name}: not readable as plain YAML: {reason}") from None


class OneLine(list):
    """A list that :func:`write_yaml` writes on one line, with everything in it."""


class _Dumper(yaml.SafeDumper):
    """Writes repeated values in full, because :func:`parse_yaml` may refuse aliases."""

    def ignore_aliases(self, data):
        return True


_Dumper.add_representer(
    OneLine,
    lambda dumper, value: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", value, flow_style=True
    ),
)


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


def read_yaml(path: str, *, aliases: bool = True) -> Any:
    """Read a YAML file of plain values and at most :data:`MAX_FILE_BYTES`.

    Args:
        aliases: see :func:`parse_yaml`.

    Raises:
        NATSError: the file is missing, a folder, too large, not text, or not plain YAML; names it.
    """
    data = read_bounded(path)
    try:
        return parse_yaml(data.decode("utf-8"), str(path), aliases=aliases)
    except UnicodeDecodeError:
        raise NATSError(f"{path}: not a UTF-8 text file") from None


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
    """Write plain values and :class:`OneLine` lists, in their order, for :func:`read_yaml`.

    Args:
        comment: lines at the top, each with a "#".
    """
    text = comment + yaml.dump(
        content, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=math.inf
    )
    write_atomically(path, text)
