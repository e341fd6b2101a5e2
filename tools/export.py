#!/usr/bin/env python
"""Write the plain config (and the weights) of a searched detector."""

from detectron2_nats.commands.export import run

if __name__ == "__main__":
    run("python tools/export.py")
