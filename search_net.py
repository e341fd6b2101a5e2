#!/usr/bin/env python
"""Search which dilation each channel group of a detector's backbone should use."""

from nats_commands import main

if __name__ == "__main__":
    main("search")
