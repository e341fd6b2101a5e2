#!/usr/bin/env python
"""Draw an architecture, α's history, effective receptive fields and detections."""

from detectron2_nats.commands.plot import run

if __name__ == "__main__":
    run("python tools/plot.py")
