"""A target with its latency table as a file: whole, readable, or refused in a sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from quantkit.errors import CorruptFile, InvalidRequest
from quantkit.targets import Target
from tests.test_latency import TABLE

MEASURED = replace(Target.load("onnxruntime-cpu"), latency=TABLE)


def test_a_saved_target_comes_back_equal_by_path_and_by_text(tmp_path: Path) -> None:
    path = MEASURED.save(tmp_path / "target.yaml")
    assert Target.load(path) == Target.load(str(path)) == MEASURED
    assert Target.load("onnxruntime-cpu").latency is None


def test_the_file_is_plain_yaml_a_line_per_part(tmp_path: Path) -> None:
    text = MEASURED.save(tmp_path / "target.yaml").read_text()
    assert text.startswith("# Times of one model on one machine, measured by `quantkit bench`")
    assert "    conv: {float_ns: 1000, integer_ns: 400, wide_ns: 700}\n" in text
    assert yaml.safe_load(text)["latency"]["notes"]["host"] == "here"


def test_a_target_without_a_table_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="has no latency table to save: `quantkit bench` measures one"):
        Target.load("onnxruntime-cpu").save(tmp_path / "target.yaml")


BROKEN = {
    "nothing": ("", "is not a target file"),
    "no YAML": ("latency: [", "is not a target file of `quantkit bench`"),
    "a list": ("- 1\n", "is not a target file"),
    "no table": ("target: onnxruntime-cpu\n", "it lacks 'latency'"),
    "a table of something else": ("target: onnxruntime-cpu\nlatency: {a: 1}\n", "it lacks 'model'"),
    "code": ("latency: !!python/object/apply:os.getcwd []\n", "is not a target file"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_something_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "target.yaml"
    path.write_text(text)
    with pytest.raises(CorruptFile) as caught:
        Target.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_says_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"Cannot read the target file .*No such file.* `quantkit bench RECIPE`"):
        Target.load(tmp_path / "missing.yaml")


def test_a_file_of_an_unknown_target_is_refused(tmp_path: Path) -> None:
    path = replace(MEASURED, name="tpu").save(tmp_path / "target.yaml")
    with pytest.raises(InvalidRequest, match="Unknown target 'tpu'"):
        Target.load(path)
