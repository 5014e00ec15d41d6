"""A limit on the file, graph included: the file that is written meets it, and one that cannot be met is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantkit
from quantkit.errors import InfeasibleBudget, InvalidRequest
from quantkit.stages import profile as first_stage
from quantkit.stages.file_size import FileLengths
from quantkit.stages.request import make_ready
from tests.program.models import randn
from tests.stages.networks import images, small
from tests.stages.test_one_scheme import mixed

QUICK = {"progress": False, "reconstruction": "none", "correction": None}
NETWORKS = {"residual": (small, images()), "mixed": (mixed, randn(8, 2, 6, 6))}


@pytest.mark.parametrize(("network", "scheme"), [("residual", "w5a6"), ("mixed", "w8a8"), ("mixed", "w4")])
def test_the_length_of_a_file_is_known_before_a_plan_is_applied(network: str, scheme: str, tmp_path: Path) -> None:
    build, x = NETWORKS[network]
    made = quantkit.quantize(build(), scheme, x, **QUICK)
    report = made.export_onnx(tmp_path / "model.onnx")
    request = make_ready(build(), x, schemes=[scheme])
    assert FileLengths(request.session)(made.plan) == report.file_bytes


def test_writing_files_ahead_leaves_the_float_model_as_it_is() -> None:
    build, x = NETWORKS["residual"]
    made = quantkit.quantize(build(), "w4", x, **QUICK)
    request = make_ready(build(), x, schemes=["w4"])
    before = {n: request.session.prepared.weights[n].clone() for n in made.plan.schemes}
    FileLengths(request.session)(made.plan)
    assert all(torch.equal(request.session.prepared.weights[n], weight) for n, weight in before.items())


def smallest_of(build: Any, x: Any, **options: Any) -> float:
    with pytest.raises(InfeasibleBudget, match=r"^No plan has file size 1 KB: the smallest file") as refused:
        quantkit.quantize(build(), "file_size=1 KB", x, **QUICK, **options)
    assert refused.value.limit == "file_size=1 KB"
    return refused.value.smallest


@pytest.mark.slow
def test_the_file_meets_the_limit_that_a_refusal_names(tmp_path: Path, monkeypatch) -> None:
    build, x = NETWORKS["mixed"]
    with monkeypatch.context() as patched:
        patched.setattr(first_stage, "_measure", lambda *_: pytest.fail("something was measured"))
        least = smallest_of(build, x, schemes=["w2a8", "w8a8"])
    sizes = []
    for limit in (1000 * least, 1000 * least + 200):
        made = quantkit.quantize(build(), f"file_size={limit:.0f} B", x, schemes=["w2a8", "w8a8"], **QUICK)
        sizes.append(made.export_onnx(tmp_path / "model.onnx").file_bytes)
        assert (tmp_path / "model.onnx").stat().st_size == sizes[-1] <= limit
        assert made.plan.provenance["budget"] == f"file_size={limit:.0f} B"
    assert max(sizes) <= 1000 * least + 200 and sizes[0] <= 1000 * least


def test_one_scheme_is_checked_against_it(tmp_path: Path) -> None:
    made = quantkit.quantize(small(), "w8a8, file_size=7.1 KB", images(), **QUICK)
    assert made.profile is None
    assert made.export_onnx(tmp_path / "model.onnx").file_bytes <= 7100
    with pytest.raises(
        InfeasibleBudget, match=r"^No plan has file size 4 KB: the smallest file that was found has 7\.\d+"
    ):
        quantkit.quantize(small(), "w8a8, file_size=4 KB", images(), **QUICK)


REFUSED = {
    "accuracy": (
        "file_size=9 KB, accuracy_drop=1",
        r"^file_size beside accuracy_drop is not supported yet: limit size",
    ),
    "a share": ("file_size=50%", r"^file_size='50%' needs a unit: B, KB"),
}


@pytest.mark.parametrize(("budget", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_does_not_go_with(budget: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        quantkit.quantize(small(), budget, images(), **QUICK)


def test_a_profile_alone_cannot_meet_it() -> None:
    blank = make_ready(small(), images()).unmeasured()
    with pytest.raises(InvalidRequest, match=r"^file_size=9 KB is met by writing files, which needs the model"):
        quantkit.allocate(blank, "file_size=9 KB")


def test_a_model_that_cannot_be_run_has_no_file() -> None:
    with pytest.raises(InvalidRequest, match="example_inputs"):
        quantkit.quantize(nn.Sequential(nn.Linear(4, 3)), "file_size=9 KB", progress=False)
