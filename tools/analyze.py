#!/usr/bin/env python
"""The script of detectron2_nats/commands/analyze.py."""

from detectron2_nats.commands.analyze import run

if __name__ == "__main__":
    run("python tools/analyze.py")
