"""Read a config: from a file and KEY VALUE pairs, as plain YAML of bounded size."""

import difflib
import json
import os
import re
from typing import Any, Dict, List

from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg

from ..errors import NATSError, shown
from ..files import read_yaml
from ..method.search_space import CONVS
from .keys import add_nats_config, flat


def load_config(path: str, opts=()) -> CfgNode:
    """Detectron2's config with this project's keys, merged from a file and KEY VALUE pairs.

    Args:
        path: a config file, or the name of a Detectron2 zoo config; "" for none.

    Raises:
        NATSError: missing file, not plain YAML, unknown key or wrong type; names the file or key.
    """
    cfg = get_cfg()
    add_nats_config(cfg)
    if path.endswith(".py"):
        raise NATSError(
            f"{path} is a LazyConfig: this command takes YAML. For models of LazyConfigs see "
            "examples/lazyconfig_search.py"
        )
    if os.path.isfile(path):
        _check_bases(path)
        _merge(path, lambda: cfg.merge_from_file(path, allow_unsafe=False))
    elif path:
        # Detectron2's own configs are trusted like its code, and RetinaNet's needs an unsafe tag.
        zoo_path = _zoo_config(path)
        _merge(path, lambda: cfg.merge_from_file(zoo_path, allow_unsafe=True))
    _check_pairs(list(opts))
    for key, value in zip(opts[::2], opts[1::2]):
        if key == "MODEL.NATS.SPACE":
            cfg.MODEL.NATS.SPACE = None  # a list takes the place of a name, and the reverse
        _merge("command line", lambda: cfg.merge_from_list([key, value]))
    return cfg


def _check_pairs(opts: List[str]) -> None:
    """Refuse what cannot be KEY VALUE pairs, with the cure."""
    options = [w for w in opts if isinstance(w, str) and re.fullmatch(r"--[a-z-]{1,40}", w)]
    if options:
        raise NATSError(f"{options[0]} comes after KEY VALUE pairs, which are the last: move it")
    if len(opts) % 2:
        raise NATSError(f"command line: KEY VALUE pairs: {shown(opts[-1])} has no value")
    for key, value in zip(opts[::2], opts[1::2]):
        if key == "MODEL.NATS.STAGES":
            _refuse_stages("command line", value)


def _zoo_config(path: str) -> str:
    folder = os.path.realpath(os.path.join(os.path.dirname(model_zoo.__file__), "configs"))
    found = os.path.realpath(os.path.join(folder, path))
    # A "../" must not lead out of the zoo: the file found is read with unsafe tags
    if not found.startswith(folder + os.sep) or not os.path.isfile(found):
        raise NATSError(
            f"config {path} not found: neither a file nor the name of a config in Detectron2's "
            "zoo, such as COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
        )
    return found


def _check_bases(path: str, depth: int = 0) -> None:
    """Check a config and its bases against our limits, before Detectron2 reads them."""
    if depth > 20:
        raise NATSError(f"{path}: more than 20 levels of _BASE_: is there a cycle?")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise NATSError(f"{path}: not a config: expected KEY: VALUE lines")
    model = content.get("MODEL")
    nats = model.get("NATS") if isinstance(model, dict) else None
    if isinstance(nats, dict) and "STAGES" in nats:
        _refuse_stages(path, nats["STAGES"])
    base = content.get("_BASE_")
    if base is None:
        return
    if not isinstance(base, str):
        raise NATSError(f"{path}: _BASE_ must be the path of one config")
    base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
    _check_bases(base, depth + 1)


def _refuse_stages(where: str, stages: Any) -> None:
    """Of configs of before: a list of names, or its text."""
    words = stages if isinstance(stages, (list, tuple)) else [stages]
    names = re.findall("res[2-5]", " ".join(word for word in words if isinstance(word, str)))
    patterns = json.dumps([f"{name}.*" for name in names[:4]] or list(CONVS))
    raise NATSError(
        f"{where}: MODEL.NATS.STAGES is gone, a stage is a pattern of names now: write "
        f"MODEL.NATS.CONVS: {patterns}"
    )


def _merge(name: str, merge) -> None:
    try:
        merge()
    except Exception as error:  # Python's parser raises MemoryError for a value like "------…1"
        reason = " ".join(str(error.args[0] if error.args else type(error).__name__).split())[:300]
        unknown = re.fullmatch(r"Non-existent (?:config )?key: (.*)", reason)
        if unknown:
            reason = _unknown(unknown[1], flat(load_config("")))
        if re.match("Type mismatch .*'(tuple|list)'", reason):
            reason += (
                ": a list has quotes around its names and a comma in a list of one: \"('a',)\""
            )
        raise NATSError(f"{name}: {reason}") from None


def _unknown(key: str, known: Dict[str, Any]) -> str:
    """What is wrong with a key that Detectron2 does not know, and what was probably meant."""
    if key in known:  # a dotted key in a file
        nested = "".join(f"{part}: {{" for part in key.split(".")[:-1])
        return f"write {key} nested, {nested}{key.split('.')[-1]}: …{'}' * key.count('.')}"
    near = difflib.get_close_matches(key, known, 3, 0.75)
    return f"there is no key {key}" + (f", did you mean {' or '.join(near)}?" if near else "")
