"""A short form of the fault table; `make faults` makes the whole."""

import re
import sys

import run_faults
from runs import REPOSITORY


def test_some_faults_are_survived(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    output = tmp_path / "table.md"
    words = ["run_faults.py", "--seed", "1", "--faults", "5", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    status = run_faults.main()
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert re.findall(r"^\[ ?\d/5\] .*: identical: .* min left\)$", printed, re.M)
    assert "| **all** | **5** | **5** | **5** |" in output.read_text()
