"""Reading strangers' files and writing our own: safe YAML of bounded size, atomic writes."""

import math
import os
import tempfile
from typing import IO, Any, Callable, Mapping, Union

import yaml

from .errors import NATSError

__all__ = [
    "MAX_FILE_BYTES",
    "OneLine",
    "parse_yaml",
    "read_bounded",
    "read_yaml",
    "write_atomically",
    "write_yaml",
]

MAX_FILE_BYTES = 8 * 2**20
"""Size limit of a config or architecture file; no more is read."""

_MAX_DEPTH = 50
_MAX_SCALAR = 2**16
_MAX_ALIASED = 10_000


class _StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Plain values only, and no key twice."""

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep=deep)
        if isinstance(node, yaml.MappingNode) and len(mapping) < len(node.value):
            raise yaml.YAMLError(f"duplicate key, near line {node.start_mark.line + 1}")
        return mapping


def _check_events(text: str, aliases: bool) -> None:
    """Refuse what would take the composer much more time, stack or memory than the text has bytes.

    It recurses without a bound of its own, reads "1:1:1:…" (base 60) in quadratic time, and
    aliases of aliases make a small file large.
    """
    depth = events = aliased = 0
    open_anchors = []  # per open collection: its anchor, and how many events came before it
    sizes = {}  # anchor → events of its node, its own aliases expanded
    for event in yaml.parse(text, Loader=_StrictLoader):
        events += 1
        if isinstance(event, yaml.events.CollectionStartEvent):
            open_anchors.append((event.anchor, events + aliased))
            depth += 1
            if depth > _MAX_DEPTH:
                raise yaml.YAMLError(f"nested more than {_MAX_DEPTH} deep")
        elif isinstance(event, yaml.events.CollectionEndEvent):
            anchor, before = open_anchors.pop()
            sizes[anchor] = events + aliased - before
            depth -= 1
        elif isinstance(event, yaml.events.ScalarEvent):
            sizes[event.anchor] = 1
            if len(event.value) > _MAX_SCALAR:
                raise yaml.YAMLError(f"a value of more than {_MAX_SCALAR} characters")
        elif isinstance(event, yaml.events.AliasEvent):
            if not aliases:
                raise yaml.YAMLError("aliases are not allowed")
            aliased += sizes.get(event.anchor, _MAX_ALIASED + 1)  # unknown: it holds itself
            if aliased > _MAX_ALIASED:
                raise yaml.YAMLError(f"aliases stand for more than {_MAX_ALIASED} values")


def parse_yaml(text: str, name: str, *, aliases: bool = True) -> Any:
    """Parse YAML of plain values.

    Args:
        aliases: allow some; Detectron2 writes them into its own config dumps.

    Raises:
        NATSError: one line that names the file `name`, whatever is wrong with the text.
    """
    try:
        _check_events(text, aliases)
        return yaml.load(text, Loader=_StrictLoader)
    except Exception as error:  # the constructors of `!!bool x` and the like raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise NATSError(f"{name}: not readable as plain YAML: {reason}") from None


class OneLine(list):
    """A list that :func:`write_yaml` writes on one line, with all that is in it."""


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
        NATSError: missing, a folder, too large; names the file.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise NATSError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise NATSError(f"{path}: more than the {MAX_FILE_BYTES} bytes that are read")
    return data


def read_yaml(path: str, *, aliases: bool = True) -> Any:
    """Read a YAML file of plain values and at most :data:`MAX_FILE_BYTES`.

    Args:
        aliases: see :func:`parse_yaml`.

    Raises:
        NATSError: missing, a folder, too large, not text, not plain YAML; names the file.
    """
    data = read_bounded(path)
    try:
        return parse_yaml(data.decode("utf-8"), str(path), aliases=aliases)
    except UnicodeDecodeError:
        raise NATSError(f"{path}: not a text file in UTF-8") from None


def write_atomically(path: str, content: Union[str, Callable[[IO[bytes]], Any]]) -> None:
    """Write a file beside `path`, flush it to the disk, then rename it to `path`.

    A kill or a full disk in the middle leaves the old file as it was.

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
    """Write plain values and :class:`OneLine`, in their order, as :func:`read_yaml` reads them.

    Args:
        comment: lines at the top, each with its "#".

    Raises:
        NATSError: it would not be read, such as for its length; nothing is written then.
    """
    text = comment + yaml.dump(
        content, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=math.inf
    )
    if len(text) > MAX_FILE_BYTES:
        raise NATSError(f"{path}: {len(text)} bytes to write, at most {MAX_FILE_BYTES} are read")
    parse_yaml(text, path)
    write_atomically(path, text)
