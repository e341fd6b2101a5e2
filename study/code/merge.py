"""Results of a study in its results.json: read it, and join those that several machines wrote."""

import itertools
import json
from typing import Any, Dict, List

from ...errors import NATSError, one_line


def read_results(path: str) -> Dict[str, Any]:
    """Read a results.json, or a file of docs/results."""
    try:
        with open(path) as file:
            results = json.load(file)
        {*results["methods"], *results["searches"], *results["seeds"]}
    except OSError as error:
        raise NATSError(f"{path}: cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise NATSError(f"{path}: not the results of a study: {one_line(error)}") from None
    if not results["methods"] or not results["seeds"]:
        raise NATSError(f"{path}: contains no results yet")
    return results


def together(paths: List[str]) -> Dict[str, Any]:
    """One study, of which several machines ran different seeds or methods.

    Returns:
        The results of the seeds that all methods have. Other values are those of each method's
        first file; time ratios of the first that has the same first method, to which they are.
    """
    parts = [read_results(path) for path in paths]
    if len(parts) == 1:
        return parts[0]
    first, *others = [next(iter(part["methods"])) for part in parts]
    for part, reference in zip(parts[1:], others):
        for result in part["methods"].values():
            result["time_ratio"] = result["time_ratio"] if reference == first else None
    cells: Dict[str, Dict[str, Dict[int, Any]]] = {"methods": {}, "searches": {}}
    for path, part in zip(paths, parts):
        for group, place in itertools.product(cells, range(len(part["seeds"]))):
            for name, values in part[group].items():
                seeds = cells[group].setdefault(name, {})
                seed = part["seeds"][place]
                if group == "methods" and seed in seeds:
                    raise NATSError(f"{path}: {name} of seed {seed} is in another file, too")
                seeds[seed] = _of_seed(values, place)
    seeds = sorted(set.intersection(*map(set, cells["methods"].values())))
    if not seeds:
        raise NATSError(f"{', '.join(paths)}: no seed has results of all methods")
    methods, searches = (
        {n: _joined([c[seed] for seed in seeds]) for n, c in group.items() if c.keys() >= {*seeds}}
        for group in cells.values()
    )
    for result in methods.values():
        result["pooled"] = None  # needs the detections
    return {"seeds": seeds, "methods": methods, "searches": searches}


def _of_seed(values: Any, place: int) -> Any:
    """The same structure with the list of each seed's values cut to one of them."""
    if isinstance(values, dict):
        return {name: _of_seed(value, place) for name, value in values.items()}
    return [values[place]] if isinstance(values, list) else values


def _joined(parts: List[Any]) -> Any:
    """The lists of equal structures one after the other; of other values the first known one."""
    if isinstance(parts[0], dict):
        names = [name for name in parts[0] if all(name in part for part in parts)]
        return {name: _joined([part[name] for part in parts]) for name in names}
    if isinstance(parts[0], list):
        return sum(parts, [])
    return next((part for part in parts if part is not None), None)
