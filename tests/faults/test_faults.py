"""A short form of the fault table; `make faults` makes the whole."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("run_faults.py")


def test_some_faults_are_survived(tmp_path):
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--seed", "1", "--faults", "5"]
    command += ["--output", str(tmp_path / "table.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^\[ ?\d/5\] .*: identical: .* min left\)$", done.stdout, re.M)
    assert "| **all** | **5** | **5** | **5** |" in (tmp_path / "table.md").read_text()


def test_help_has_an_example():
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--help"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "examples:" in output and "$ python tests/faults/run_faults.py" in output
