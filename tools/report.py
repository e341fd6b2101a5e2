#!/usr/bin/env python
"""The script of detectron2_nats/commands/report.py."""

from detectron2_nats.commands.report import run

if __name__ == "__main__":
    run("python tools/report.py")
