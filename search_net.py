#!/usr/bin/env python
"""Search which dilation each channel group of a detector's backbone should use."""

from detectron2_nats.commands.search import run

if __name__ == "__main__":
    run()
