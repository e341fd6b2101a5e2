#!/usr/bin/env python
"""Make an architecture file of IC-Conv's pattern or RF-Next's structure (JSON)."""

from detectron2_nats.commands.import_architecture import run

if __name__ == "__main__":
    run("python tools/import_architecture.py")
