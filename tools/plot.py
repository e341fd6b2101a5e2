#!/usr/bin/env python
"""The script of detectron2_nats/commands/plot.py."""

from detectron2_nats.commands.plot import run

if __name__ == "__main__":
    run("python tools/plot.py")
