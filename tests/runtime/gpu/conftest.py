"""Triton kernels run on a GPU where there is one, and through Triton's interpreter on the CPU elsewhere."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before its module is imported

pytest.importorskip("triton", reason="Triton is not installed: the test extra has it")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
