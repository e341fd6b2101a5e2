#!/usr/bin/env python
"""Train or evaluate a detector: a plain one, or one with a searched backbone."""

from detectron2_nats.commands.train import run

if __name__ == "__main__":
    run()
