#!/usr/bin/env python
"""Print an architecture, and what it costs: the backbone's parameters, FLOPs, activations."""

from detectron2_nats.commands.analyze import run

if __name__ == "__main__":
    run("python tools/analyze.py")
