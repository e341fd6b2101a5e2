"""Read a run's metrics.json."""

import json
import os
from typing import Dict, Iterator, List

from ...errors import NATSError


def last_metric(folder: str, name: str) -> float:
    """The last value of a metric in a run's metrics.json.

    Raises:
        NATSError: there is none.
    """
    try:
        return [m[name] for m in _lines(folder) if name in m][-1]
    except (OSError, IndexError):
        raise NATSError(f"{folder}/metrics.json contains no {name}") from None


def per_class(folders: List[str]) -> Dict[str, List[float]]:
    """Class → AP of each run; no class where not all runs have the same ones."""
    prefix, found = "bbox/AP-", []
    for folder in folders:
        last = [m for m in _lines(folder) if "bbox/AP" in m][-1]
        found.append({k[len(prefix) :]: v for k, v in last.items() if k.startswith(prefix)})
    names = found[0] if all(f.keys() == found[0].keys() for f in found) else ()
    return {name: [classes[name] for classes in found] for name in names}


def _lines(folder: str) -> Iterator[Dict[str, float]]:
    """The lines of the file, but for those that a kill has cut off."""
    with open(os.path.join(folder, "metrics.json")) as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue
