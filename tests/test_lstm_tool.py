"""The twin of onnxruntime's DynamicQuantizeLSTM that tools/study_lstm.py describes it by."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from quantkit.backends.onnxruntime.parity import relative_error

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
from study_lstm import ONE_BY_ONE, WHOLE, Files, files_of, one_by_one, twin, values

BATCH, STEPS = 3, 6
SIZE = (8, 5, 2)  # hidden, inputs, directions
LAST_BITS = 1e-6


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return files_of(SIZE, STEPS, tmp_path_factory.mktemp("lstm"))


def run(files: Files, name: str, threads: int, x: np.ndarray) -> np.ndarray:
    return files.sessions(threads)[name].run(None, {"x": x})[0]


@pytest.mark.slow
@pytest.mark.parametrize(("threads", "together"), [(1, 3), (2, 2)])
def test_the_kernel_has_ranges_of_the_sequences_of_a_thread(files: Files, threads: int, together: int) -> None:
    x = values(BATCH, STEPS, SIZE[1])
    assert relative_error(run(files, WHOLE, threads, x), twin(x, files.layer, together)) < LAST_BITS


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_one_by_one_sequences_do_not_depend_on_others(files: Files, threads: int) -> None:
    x = values(BATCH, STEPS, SIZE[1])
    found = run(files, ONE_BY_ONE, threads, x)
    assert relative_error(found, one_by_one(x, files.layer)) < LAST_BITS
    assert np.array_equal(run(files, ONE_BY_ONE, threads, x[1:2]), found[1:2])
