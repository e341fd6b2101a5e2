#!/usr/bin/env python
"""The script of detectron2_nats/commands/import_architecture.py."""

from detectron2_nats.commands.import_architecture import run

if __name__ == "__main__":
    run("python tools/import_architecture.py")
