"""The commands of tools/ start from a plain checkout, without anything on the path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = sorted((Path(__file__).resolve().parent.parent / "tools").glob("*.py"))
ELSEWHERE = {
    "check_layout",  # takes no options, and test_layout runs it
    "train_references",  # needs scikit-learn, which no extra installs
}


@pytest.mark.slow
@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool.stem not in ELSEWHERE], ids=lambda tool: tool.stem)
def test_a_tool_starts(tool: Path, tmp_path: Path) -> None:
    free = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([sys.executable, tool, "--help"], cwd=tmp_path, env=free, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
