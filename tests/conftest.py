"""What tests share: the repository's root, the benchmark data, and the same number of threads everywhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

from quantkit.progress import log

HANDLERS = tuple(log.handlers)
REPOSITORY = Path(__file__).resolve().parent.parent

# The order of a floating-point sum depends on the number of threads: let it not depend on the machine.
# One, since tests run in one process for each core.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernel-examples", type=int, default=20, help="random shapes for every kernel (300 take some minutes)"
    )


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the benchmark data, which the repository does not carry; skips the test where it is absent."""
    folder = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no benchmark data in {folder}: set QUANTKIT_DATA to its folder")
    return folder


@pytest.fixture(scope="session", autouse=True)
def translations_once() -> Iterator[None]:
    """torch's exporter parses the source of all its translations again for every export, which is half its time: once
    is enough for all tests of a process.
    """
    parsed = staticmethod(cache(ONNXRegistry.from_torchlib))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ONNXRegistry, "from_torchlib", parsed)
        yield


@pytest.fixture(autouse=True)
def log_as_imported() -> None:
    """What commands of other tests set up for their log, on streams that are closed by now, is gone."""
    log.handlers = list(HANDLERS)
    log.setLevel(logging.INFO)


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test begins with the same random numbers, whichever ran before it, and leaves torch's gradients on."""
    torch.manual_seed(0)
    yield
    left_on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert left_on, "gradients were left switched off"
