#!/usr/bin/env python
"""Is it worth retraining? Score what a search found before days go into it."""

from detectron2_nats.commands.score import run

if __name__ == "__main__":
    run("python tools/score.py")
