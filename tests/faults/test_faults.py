"""A short form of the fault table; `make faults` makes the whole.

Of its other kinds, test_scripts.py tests signals and dead ranks, test_checkpoint.py flipped bits.
"""

import re
import sys

import run_faults
from runs import REPOSITORY


def test_some_faults_are_survived(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    output = tmp_path / "table.md"
    words = ["run_faults.py", "--seed", "1", "--faults", "2", "--output", str(output)]
    words += ["--kinds", "newest checkpoint truncated", "full disk"]
    monkeypatch.setattr(sys, "argv", words)
    status = run_faults.main()
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert len(re.findall(r"^\[\d/2\] .*: identical: ", printed, re.M)) == 2
    assert "| **all** | 2 | 2 | 2 |" in output.read_text()
