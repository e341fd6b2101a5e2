"""The page that a search or a study is shown by: complete, by itself, and readable in a browser."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest
from runs import REPOSITORY, TINY, run

from detectron2_nats.bench.report import write_report
from detectron2_nats.errors import NATSError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Appended to a copy of the page: writes into the title what does not fit or has not loaded.
PROBE = """<script>
addEventListener("load", () => {
  const wide = document.documentElement.scrollWidth - innerWidth;
  const images = [...document.images];
  const missing = images.filter(image => !image.complete || !image.naturalWidth).length;
  const cut = images.filter(i => i.getBoundingClientRect().right > innerWidth).length;
  const text = getComputedStyle(document.body);
  document.title = JSON.stringify(
    {wide, missing, cut, images: images.length, color: text.color, page: text.backgroundColor});
});
</script>"""


class Page(html.parser.HTMLParser):
    """Its text, headings and what it loads."""

    def __init__(self, text: str):
        super().__init__()
        self.headings, self.text, self.loads, self.alt, self._tag = [], "", [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._tag = tag
        attributes = dict(attributes)
        self.loads += [v for k, v in attributes.items() if k in ("src", "href")]
        self.alt += [attributes["alt"]] if "alt" in attributes else []

    def handle_data(self, data):
        self.text += data
        if self._tag in ("h1", "h2") and data.strip():
            self.headings.append(data.strip())


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """A small search's folder, with scores and a picture beside it."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "tiny.yaml").write_text(TINY)
    run(
        "search_net.py", "--config-file", str(folder / "tiny.yaml"), "OUTPUT_DIR", str(folder / "s")
    )
    (folder / "s/scores.json").write_text(json.dumps({"found": 1.25, "<b>plain": 1.5}))
    (folder / "s/pictures").mkdir()
    shutil.copy(REPOSITORY / "docs/images/study.png", folder / "s/pictures/detections.png")
    return folder / "s"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    results = str(REPOSITORY / "docs/results/bars_lying.json")
    run("nats-study", "--again", results, "--output", str(folder))
    return folder


def test_of_a_search(search):
    printed = run("nats-report", str(search), "--title", "Bars & <cells>")
    path = search / "report.html"
    assert printed.splitlines()[-1] == f"wrote {path}"
    page = Page(path.read_text())
    later = ["What was found", "What it sees", "Where it comes from"]
    assert page.headings == ["Bars & <cells>", *later]
    # undecided: six iterations are few
    assert page.text.index("The search is undecided") < page.text.index("What was found")
    assert "found1.2500<b>plain1.5000" in re.sub(r"\s", "", page.text)
    for needed in ("res5.2.conv2", "SEED: 7", "PyTorch  ", "nats-search --config-file"):
        assert needed in page.text, needed
    assert len(page.loads) == 3 and all(load.startswith("data:image/") for load in page.loads)
    assert "<script" not in path.read_text() and "http" not in "".join(page.loads)


def test_of_a_study(study):
    path = study / "page.html"
    write_report(str(study), str(path))
    page = Page(path.read_text())
    assert page.headings[1:] == ["Accuracy and cost", "What was found"]
    results = json.loads((study / "results.json").read_text())
    for name, method in results["methods"].items():
        assert name in page.text and f"{method['AP'][0]:.1f}" in page.text
    assert "nats-warm is the best of 3 searched methods, which flatters it." in page.text
    assert page.text.index("nats-warm − plain: +49.5 AP") < page.text.index("Accuracy and cost")
    assert path.read_text().count('class="verdict"') == 1


def test_the_gain_is_to_what_trained_as_long(tmp_path):
    """Equal time is called plain-1.75x there."""
    results = REPOSITORY / "docs/results/blood_cells_res2_short.json"
    shutil.copy(results, tmp_path / "results.json")
    write_report(str(tmp_path), str(tmp_path / "page.html"))
    text = Page((tmp_path / "page.html").read_text()).text
    assert "nats-warm − plain-1.75x: -0.5 AP (one seed)." in text
    assert "nats-warm − plain: +7.0 AP" in text and "flatters" not in text


def test_takes_nothing_from_the_folder_that_it_is_called_in(study, tmp_path, monkeypatch):
    (tmp_path / "scores.json").write_text(json.dumps({"a stranger": 1.25}))
    monkeypatch.chdir(tmp_path)
    write_report(str(study), "page.html")
    assert "a stranger" not in (tmp_path / "page.html").read_text()


def test_a_page_that_cannot_be_written(study, tmp_path):
    (tmp_path / "file").write_text("")
    printed = run("nats-report", str(study), "--output", str(tmp_path / "file/page.html"), status=2)
    assert "cannot be written" in printed and "Traceback" not in printed


def test_of_nothing(tmp_path):
    with pytest.raises(NATSError, match="neither architecture.yaml nor results.json"):
        write_report(str(tmp_path), str(tmp_path / "report.html"))
    assert "neither" in run("nats-report", str(tmp_path), status=2)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", ["search", "study"])
def test_in_a_browser(kind, width, tmp_path, request):
    """Nothing is missing or cut on a wide screen or a phone, by day or by night."""
    path = tmp_path / "page.html"
    write_report(str(request.getfixturevalue(kind)), str(path))
    path.write_text(path.read_text() + PROBE)
    seen = {}
    for scheme in (1, 0):  # light, dark
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += [f"--window-size={width},900", "--virtual-time-budget=20000"]
        command += [f"--blink-settings=preferredColorScheme={scheme}", f"file://{path}"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=240).stdout
        seen[scheme] = json.loads(Page(output).text.split("}")[0].strip() + "}")
        assert seen[scheme]["wide"] <= 0 and seen[scheme]["missing"] == seen[scheme]["cut"] == 0
        assert seen[scheme]["images"] == (3 if kind == "search" else 2)
    assert seen[0]["color"] != seen[1]["color"] and seen[0]["page"] != seen[1]["page"]
