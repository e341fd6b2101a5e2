#!/usr/bin/env python
"""Write one HTML page of a search, a study or the demo, to send to others."""

from detectron2_nats.commands.report import run

if __name__ == "__main__":
    run("python tools/report.py")
