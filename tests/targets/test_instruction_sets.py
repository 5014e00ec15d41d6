"""The instruction set of a target: named, known from a plan, or found once; and nothing heavy to read a target."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import quantkit.targets
from quantkit.errors import InvalidRequest
from quantkit.targets import Target
from quantkit.targets.instruction_sets import AUTO, AVX2, VNNI, detected_instruction_set
from tests.test_latency import TABLE

NAME = "onnxruntime-cpu"


@pytest.fixture(params=[AVX2, VNNI])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pretend to run on a machine of this kind."""
    monkeypatch.setattr(quantkit.targets, "detected_instruction_set", lambda: request.param)
    return str(request.param)


def test_it_is_the_targets_own_then_the_known_then_the_machines(machine: str) -> None:
    assert Target.load(NAME).instruction_set == AUTO
    assert Target.load(NAME).resolved().instruction_set == machine
    for named in (AVX2, VNNI):
        assert Target.load(NAME).resolved(named).instruction_set == named
        assert Target.load(f"{NAME}:{named}").resolved(AVX2 if named == VNNI else VNNI).instruction_set == named


def test_a_named_one_changes_nothing_else() -> None:
    assert replace(Target.load(f"{NAME}:avx2"), instruction_set=AUTO) == Target.load(NAME)
    assert Target.load(f"{NAME}:avx2").digest() == Target.load(f"{NAME}:vnni").digest() == Target.load(NAME).digest()
    assert replace(Target.load(NAME), integer_ops=()).digest() != Target.load(NAME).digest()


def test_a_measured_target_keeps_the_one_it_was_measured_with(tmp_path: Path, machine: str) -> None:
    other = VNNI if machine == AVX2 else AVX2
    path = replace(Target.load(f"{NAME}:{other}"), latency=TABLE).save(tmp_path / "target.yaml")
    assert Target.load(path).resolved().instruction_set == other
    path.write_text(path.read_text().replace(f"instruction_set: {other}\n", ""))  # as earlier versions wrote it
    assert Target.load(path).resolved().instruction_set == machine


@pytest.mark.parametrize("name", [f"{NAME}:", f"{NAME}:vnnni", f"{NAME}:avx2:vnni"])
def test_an_unknown_one_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"has no instruction set '.*'; known: auto, vnni, avx2"):
        Target.load(name)


@pytest.mark.parametrize("roles", [{"querry": "may"}, {"query": "yes"}])
def test_roles_are_known_ones(roles: dict[str, str]) -> None:
    with pytest.raises(
        InvalidRequest, match=r"roles: layer input, .*; each must, may, for products, cannot hold codes"
    ):
        replace(Target.load(NAME), roles=roles)


def test_this_machine_has_one_of_them() -> None:
    assert detected_instruction_set() in (VNNI, AVX2)


def test_reading_a_target_imports_no_model_library() -> None:
    """The package's face imports everything; a stand-in for it shows what targets need."""
    code = f"""
import sys, types
package = types.ModuleType("quantkit")
package.__path__ = [{str(Path(quantkit.__file__).parent)!r}]
sys.modules["quantkit"] = package
from quantkit.targets import Target
assert Target.load("{NAME}").layers
print(sorted({{"torch", "onnx", "onnxruntime", "onnx_ir"}} & sys.modules.keys()))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
