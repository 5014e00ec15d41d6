"""The promises around the code: one test command, pinned versions, a light import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path

HEAVY = ("onnx", "onnxruntime", "onnxscript", "pulp", "matplotlib", "scipy", "triton", "transformers")

# Run in a process of its own: which heavy packages does the import add to torch's, and how much time?
IMPORT_QUANTKIT = """
import json, sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import quantkit
end = time.perf_counter()
print(json.dumps({
    "heavy": [name for name in sys.argv[1:] if name in sys.modules],
    "cuda": torch.cuda.is_initialized(),
    "torch_seconds": middle - start,
    "seconds_beyond_torch": end - middle,
}))
"""


def readme_command(repo: Path, ending: str) -> str:
    """The README's command, a code block of one line, with this ending."""
    blocks = re.findall(r"^```\w*\n(.+)\n```$", (repo / "README.md").read_text(), re.MULTILINE)
    (command,) = (block for block in blocks if block.endswith(ending))
    return command


def normalised(requirement: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~;\[]", requirement.strip(), maxsplit=1)[0]).lower()


def named_in_setup(repo: Path) -> set[str]:
    """Every distribution setup.cfg asks for, extras included."""
    setup = ConfigParser()
    setup.read(repo / "setup.cfg")
    lists = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    return {normalised(line) for text in lists for line in text.splitlines() if line.strip()}


def test_ci_runs_the_readmes_test_command(repo: Path) -> None:
    lines = [line.strip() for line in (repo / ".ci" / "run").read_text().splitlines()]
    assert lines.count(readme_command(repo, "--dist loadfile")) == 1


def test_readme_runs_a_recipe_that_is_here(repo: Path) -> None:
    recipe = readme_command(repo, ".yaml").split()[-1]
    assert (repo / recipe).is_file()


def test_every_dependency_is_pinned(repo: Path) -> None:
    lines = (line.partition("#")[0].strip() for line in (repo / "constraints.txt").read_text().splitlines())
    pins = [line for line in lines if line]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", pin) for pin in pins)
    missing = named_in_setup(repo) - {normalised(pin) for pin in pins}
    assert not missing, f"constraints.txt does not pin {sorted(missing)}"


def test_import_is_light(repo: Path, record_property: Callable[[str, object], None]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_QUANTKIT, *HEAVY], cwd=repo, capture_output=True, text=True, check=True
    )
    seen = json.loads(done.stdout)
    for name in ("torch_seconds", "seconds_beyond_torch"):  # in the report, not asserted: a busy machine is no bug
        record_property(name, seen[name])
    assert seen["heavy"] == []
    assert not seen["cuda"]
