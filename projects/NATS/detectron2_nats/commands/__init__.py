"""The commands, nats-search and others. The repository's scripts call the same modules."""

import importlib
import sys
from pathlib import Path


def main() -> None:
    """Run the command under whose name this process was started: nats-search is :mod:`.search`."""
    name = Path(sys.argv[0]).stem
    module = name.removeprefix("nats-").replace("import", "import_architecture")
    try:
        importlib.import_module(f".{module}", __name__).run()
    except ModuleNotFoundError as error:
        package = error.name.split(".")[0]
        print(f"error: {name} needs {package}, which is not installed here", file=sys.stderr)
        sys.exit(2)
