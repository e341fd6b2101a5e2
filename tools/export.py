#!/usr/bin/env python
"""The script of detectron2_nats/commands/export.py."""

from detectron2_nats.commands.export import run

if __name__ == "__main__":
    run("python tools/export.py")
