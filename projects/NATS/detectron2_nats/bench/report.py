"""One HTML page about a search or a study, to send to others: no scripts, no external files."""

import base64
import glob
import html
import io
import json
import os
import re
from typing import Any, Dict, List, NamedTuple, Optional

import jinja2
import markdown
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from ..errors import NATSError
from ..files import write_atomically
from ..method.architecture import Architecture
from ..search.export import settings_of
from ..search.folder import SearchFolder
from . import pictures
from .baselines import dilation_shares
from .history import read_history
from .study.intervals import paired_interval
from .study.methods import Method
from .study.plan import searches_of

_PICTURES = {
    "look": "How far each level sees, and how large the objects are.",
    "detections": "Detections of both networks on the same images.",
    "study": "AP of each method and seed.",
}
_TYPES = {"png": "image/png", "svg": "image/svg+xml"}


class _Part(NamedTuple):
    """A block of a section: an image, HTML, a folded text or a plain text, with its caption."""

    caption: str = ""
    image: str = ""
    html: str = ""
    folded: str = ""
    text: str = ""


def write_report(folder: str, path: str, title: str = "") -> None:
    """Write the results in a folder as one HTML file.

    Args:
        folder: the output folder of a search, a study or the demo. Pictures that nats-plot and
            nats-look have written inside it are included.
        path: the file to write.
        title: heading of the page; by default it names the folder.

    Raises:
        NATSError: the folder contains neither a search nor a study, or a file is not readable.
    """
    results = _json(os.path.join(folder, "results.json"))
    searches = map(SearchFolder, [folder, *searches_of(folder)])
    search = next((s for s in searches if s.has("architecture.yaml")), None)
    if not results and not search:
        raise NATSError(
            f"{folder} contains neither architecture.yaml nor results.json: name the output folder "
            "of a search or a study"
        )
    verdict, sure, sections = [], True, {}
    architecture = None
    if results:
        verdict += _gain(results)
        sections["Accuracy and cost"] = _study(folder)
        for found in results["searches"].values():
            architecture = Architecture.from_config(found["architectures"][0], paths=None)
    if search:
        architecture = search.architecture()
        decidedness = architecture.search.get("decidedness", {})
        if "verdict" in decidedness:
            verdict.append(f"The search is {decidedness['verdict']}. {_numbers(decidedness)}")
            sure = decidedness["verdict"].startswith("decided")
    if architecture:
        note = " This is the search of the first seed." if results else ""
        sections["What was found"] = _found(architecture, note)
        sections["What was found"] += _history(search) if search else []
    sections["What it sees"] = _pictures(folder, ["look", "detections"])
    sections["Where it comes from"] = _provenance(search or SearchFolder(folder))
    with open(os.path.join(os.path.dirname(__file__), "report.html")) as file:
        template = jinja2.Environment(autoescape=True).from_string(file.read())
    page = template.render(
        title=title or f"Dilation search: {os.path.basename(os.path.abspath(folder))}",
        verdict=verdict or ["It was not recorded how decided a search is, or there was none."],
        sure=sure,
        sections=sections,
    )
    write_atomically(path, page)


def _json(path: str) -> Optional[Dict[str, Any]]:
    try:
        with open(path) as file:
            return json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise NATSError(f"{path}: not readable: {error}") from None


def _gain(results: Dict[str, Any]) -> List[str]:
    """How the best searched method of a study compares with all that need no search."""
    methods = {name: result["AP"] for name, result in results["methods"].items()}
    searched = [name for name in methods if name.startswith("nats")]
    if not searched:
        return []
    best = max(searched, key=lambda name: sum(methods[name]))
    sentences = []
    if len(searched) > 1:
        sentences.append(
            f"{best} is the best of {len(searched)} searched methods, which flatters it."
        )
    for reference in (name for name in methods if Method.of(name).is_reference):
        mean, half = paired_interval([a - b for a, b in zip(methods[best], methods[reference])])
        interval = "one seed" if len(methods[best]) == 1 else f"95 % interval ± {half:.1f}"
        sentences.append(f"{best} − {reference}: {mean:+.1f} AP ({interval}).")
    return sentences


def _numbers(decidedness: Dict[str, Any]) -> str:
    changed = decidedness.get("changed")
    return (
        f"Entropy of α {decidedness['entropy']:.2f} of 1, "
        f"{decidedness['leading']:.0%} of the channel groups lead"
        + ("." if changed is None else f", {changed:.0%} of the votes changed in the last tenth.")
    )


def _study(folder: str) -> List[_Part]:
    path = os.path.join(folder, "study.md")
    if not os.path.isfile(path):
        return []
    with open(path) as file:
        return [_Part(html=_html(file.read())), *_pictures(folder, ["study"])]


def _found(architecture: Architecture, note: str) -> List[_Part]:
    shares = dilation_shares([architecture]).items()
    listed = ", ".join(f"{h}×{w} {share:.0%}" for (h, w), share in shares)
    figure = pictures.plot_architecture(architecture)
    return [
        _Part(f"Channels per dilation and layer. In total: {listed}.{note}", _svg(figure)),
        _Part("The same as a table", folded=architecture.summary()),
    ]


def _history(search: SearchFolder) -> List[_Part]:
    """The history of α, and the scores that nats-score has written."""
    parts = []
    if search.has("metrics.json"):
        figure = pictures.plot_history(read_history(search.file("metrics.json")))
        parts.append(_Part("Entropy of α and shares of the votes, over the search.", _svg(figure)))
    scores = _json(search.file("scores.json"))
    if scores:
        lines = ["| architecture | loss on calibration images |", "| --- | ---: |"]
        lines += [
            f"| {html.escape(n)} | {v:.4f} |" for n, v in sorted(scores.items(), key=lambda s: s[1])
        ]
        parts.append(_Part(html=_html("\n".join(lines))))
    return parts


def _html(text: str) -> Markup:
    """Our own tools' Markdown as HTML. A wide table scrolls sideways on a narrow screen."""
    text = markdown.markdown(text, extensions=["tables"])
    text = text.replace("<table>", '<div class="wide"><table>')
    return Markup(text.replace("</table>", "</table></div>"))


def _svg(figure: Figure) -> str:
    # as an image: the ids of two inline SVGs would clash
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return _data_url(buffer.getvalue(), "svg")


def _data_url(content: bytes, suffix: str) -> str:
    return f"data:{_TYPES[suffix]};base64,{base64.b64encode(content).decode()}"


def _pictures(folder: str, names: List[str]) -> List[_Part]:
    parts = []
    for name in names:
        for path in sorted(
            glob.glob(os.path.join(glob.escape(folder), "**", f"{name}.[ps][nv]g"), recursive=True)
        )[:1]:
            with open(path, "rb") as file:
                parts.append(_Part(_PICTURES[name], _data_url(file.read(), path[-3:])))
    return parts


def _provenance(search: SearchFolder) -> List[_Part]:
    """How to repeat it: commands, config, versions."""
    parts = []
    beside = os.path.join(glob.escape(search.path), "..", "*", "console.txt")  # a study's
    commands = [line for line in map(_first_line, sorted(glob.glob(beside))) if line[:2] == "$ "]
    if commands:
        seed = os.path.basename(os.path.dirname(os.path.abspath(search.path)))
        parts.append(_Part(f"The runs of {seed.replace('_', ' ')}:", text="\n".join(commands)))
    elif search.has("config.yaml"):
        config = search.file("config.yaml")
        command = f"$ nats-search --config-file {config} OUTPUT_DIR output/again"
        parts.append(_Part("To repeat the search:", text=command))
    if search.has("config.yaml"):
        settings = yaml.safe_dump(settings_of(search.cfg), default_flow_style=None)
        parts.append(_Part("The search's config", folded=settings))
    if search.has("log.txt"):
        with open(search.file("log.txt"), errors="replace") as file:
            text = file.read()
        found = re.search(r"Environment info:\n(.*?)\nPyTorch built with", text, re.S)
        if found:
            parts.append(_Part("Versions", folded=found[1]))
    return parts


def _first_line(path: str) -> str:
    with open(path, errors="replace") as file:
        return file.readline().rstrip()
