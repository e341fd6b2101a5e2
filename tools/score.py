#!/usr/bin/env python
"""The script of detectron2_nats/commands/score.py."""

from detectron2_nats.commands.score import run

if __name__ == "__main__":
    run("python tools/score.py")
