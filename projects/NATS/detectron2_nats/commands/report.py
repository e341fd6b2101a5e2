"""Write one HTML page about a search, a study or the demo, to send to others.

It begins with the verdict. Then follow accuracy and cost, the architecture, the history of α,
what it sees and detects (if nats-look and nats-plot have drawn it), and how to repeat it. The page
needs no other file.
"""

import argparse
import os

from ..bench.report import write_report
from .cli import run_tool, tool_parser, write

EPILOG = """
examples:
  of a search:
    $ %(prog)s output/search
  of the demo:
    $ %(prog)s output/demo --output demo.html --title "Columns of registers"
"""


def main(args: argparse.Namespace) -> None:
    path = args.output or os.path.join(args.folder, "report.html")
    write(path, lambda: write_report(args.folder, path, args.title))


def run() -> None:
    parser = tool_parser(__doc__, EPILOG, "nats-report")
    parser.add_argument("folder", help="output folder of a search, a study or the demo")
    parser.add_argument(
        "--output", default="", metavar="HTML", help="file to write (FOLDER/report.html)"
    )
    parser.add_argument("--title", default="", help="heading of the page")
    run_tool(main, parser.parse_args())
