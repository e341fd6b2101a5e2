#!/usr/bin/env python
"""Train or evaluate a detector: a plain one, or one with a searched backbone."""

from nats_commands import main

if __name__ == "__main__":
    main("train")
