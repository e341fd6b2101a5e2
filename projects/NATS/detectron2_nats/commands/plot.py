"""Draw an architecture, α's history, and what two detectors detect, side by side."""

import argparse
import os

from ..errors import NATSError
from ..search.folder import SearchFolder
from ..show import pictures
from ..show.history import read_history
from .cli import run_tool, tool_parser, whole_number

EPILOG = """
examples:
  architecture.png and history.png of a search:
    $ %(prog)s output/search --output output/pictures
  architecture.svg of an architecture file:
    $ %(prog)s architecture.yaml --output output/pictures --format svg
  also detections.png, from two trained detectors:
    $ %(prog)s output/search --output output/pictures --images 4 \\
        --plain configs/quickstart/base.yaml output/plain/model_final.pth \\
        --searched output/search/retrain.yaml output/searched/model_final.pth
"""


def main(args: argparse.Namespace) -> None:
    formats = ["png", "svg"] if args.format == "both" else [args.format]
    if bool(args.searched) != bool(args.plain):
        raise NATSError(
            "--searched is drawn beside --plain: give both (how far one sees: nats-look)"
        )
    if not args.source and not args.plain:
        raise NATSError("give a search's output folder, an architecture file, or two detectors")
    folder = SearchFolder(args.source)
    figures = {}
    if args.source:
        architecture = folder.architecture()
        figures["architecture"] = pictures.plot_architecture(architecture, args.title)
    if os.path.isdir(args.source) and os.path.isfile(folder.file("metrics.json")):
        verdict = architecture.search.get("decidedness", {}).get("verdict", "")
        figures["history"] = pictures.plot_history(
            read_history(folder.file("metrics.json")), args.title or verdict
        )
    if args.plain:
        from ..show.detectors import detections_figure  # the rest needs no Detectron2

        figures["detections"] = detections_figure(args)
    output = args.output or folder.file("pictures")
    paths = []
    for name, figure in figures.items():
        try:
            paths += pictures.save(figure, output, name, formats)
        except OSError as error:
            raise NATSError(f"{output}: cannot be written: {error.strerror or error}") from None
    for path in paths:
        print(f"wrote {path}")


def run() -> None:
    parser = tool_parser(__doc__, EPILOG, "nats-plot")
    parser.add_argument(
        "source", nargs="?", default="", help="a search's output folder, or an architecture file"
    )
    parser.add_argument(
        "--output", default="", help="folder to write (SOURCE/pictures, or pictures)"
    )
    parser.add_argument(
        "--format", choices=["png", "svg", "both"], default="png", help="of the files (png)"
    )
    parser.add_argument("--title", default="", help="a line above each picture")
    pair = {"nargs": 2, "metavar": ("CONFIG", "WEIGHTS")}
    parser.add_argument("--plain", **pair, help="config and weights of the plain detector")
    parser.add_argument("--searched", **pair, help="of the searched detector, to compare")
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="change both detectors' configs"
    )
    parser.add_argument("--dataset", default="", help="where images are from (DATASETS.TEST)")
    parser.add_argument(
        "--images",
        type=whole_number(4096),
        default=4,
        help="number of images with detections (%(default)s)",
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="lowest score that is drawn (%(default)s)"
    )
    run_tool(main, parser.parse_args())
