"""What stays float, stored as float16: numpy's rounded values are what is simulated, counted, saved and run."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import quantkit
from quantkit.errors import InfeasibleBudget, InvalidRequest
from quantkit.numbers.half import LEAST_ELEMENTS
from tests.backends.helpers import initializers, operations_that_run
from tests.backends.test_float16_weights import F16, ROWS, Tied, outputs, perceptron, run
from tests.backends.test_promised_bytes import NETWORKS, QUICK, Decoder, distinct, stored_bytes
from tests.program.models import randn

F32 = onnx.TensorProto.FLOAT
HALF = QUICK | {"float_storage": "float16"}


def twin(model: nn.Module, but: tuple[str, ...] = ()) -> nn.Module:
    """A copy with its parameters, the smallest and those named aside, rounded by numpy."""
    found = copy.deepcopy(model)
    for name, parameter in found.named_parameters():
        if parameter.numel() >= LEAST_ELEMENTS and name not in but:
            parameter.data = torch.from_numpy(parameter.detach().numpy().astype(np.float16).astype(np.float32))
    return found


def wide_floats(path: Path) -> set[str]:
    """The initializers in float32 that are no scales and worth to be float16."""
    found = {name: t for name, t in initializers(path).items() if t.data_type == F32 and not name.endswith("scale")}
    return {name for name, tensor in found.items() if np.prod(tensor.dims) >= LEAST_ELEMENTS}


@pytest.mark.parametrize("name", ["transformer", "recurrent"])
def test_all_that_is_float_is_rounded_stored_and_counted_so(name: str, tmp_path: Path) -> None:
    model, x = distinct(NETWORKS[name][0]), NETWORKS[name][1]
    result = quantkit.quantize(model, "w16", x, rules={"head": "float"}, **HALF)
    wanted = outputs(twin(model, but=("head.bias",)), x)
    torch.testing.assert_close(outputs(result.model, x), wanted, rtol=0, atol=0)
    assert result.plan.average_bits == 16 and result.plan.provenance["float_storage"] == "float16"

    report = result.export_onnx(tmp_path / "model.onnx")
    torch.testing.assert_close(run(report.path, x), wanted, rtol=1e-5, atol=1e-6)
    counted = stored_bytes(report.path)
    assert counted <= result.plan.total_bytes <= 1.02 * counted + 128
    assert wide_floats(report.path) == set()
    assert operations_that_run(report.path, tmp_path).count("Cast") == (1 if name == "transformer" else 0)


def test_beside_codes_the_rest_is_float16_and_biases_of_integer_kernels_stay(tmp_path: Path) -> None:
    model = perceptron()
    result = quantkit.quantize(model, "w8a8", ROWS, rules={"head": "float"}, **HALF)
    plain = quantkit.quantize(model, "w8a8", ROWS, rules={"head": "float"}, **QUICK)
    halved = {name: p.numel() for name, p in model.named_parameters() if name in ("head.weight", *NORM)}
    assert plain.plan.total_bytes - result.plan.total_bytes == 2 * sum(halved.values())
    state, given = result.quantized.model.state_dict(), model.state_dict()
    assert all(torch.equal(state[name], given[name].half().float()) for name in halved)
    assert torch.equal(state["rows.2.bias"], plain.quantized.model.state_dict()["rows.2.bias"])
    report = result.export_onnx(tmp_path / "model.onnx")
    assert stored_bytes(report.path) <= result.plan.total_bytes <= 1.02 * stored_bytes(report.path) + 64
    assert wide_floats(report.path) == {"rows.2.bias", "rows.1.ratio"}  # and by what the layer divides what it reads
    assert report.file_bytes < plain.export_onnx(tmp_path / "plain.onnx").file_bytes - 3000


NORM = ("rows.1.weight", "rows.1.bias")


def test_what_float16_cannot_hold_stays_float32(tmp_path: Path) -> None:
    model = perceptron()
    with torch.no_grad():
        model.head.weight[0, 0], model.rows[1].weight[0] = 70000.0, -1e5
    result = quantkit.apply(model, {"rows.0": "w4"}, ROWS, **HALF)
    state = result.quantized.model.state_dict()
    assert torch.equal(state["head.weight"], model.head.weight) and torch.equal(state[NORM[0]], model.rows[1].weight)
    assert torch.equal(state["rows.2.weight"], model.rows[2].weight.half().float())
    report = result.export_onnx(tmp_path / "model.onnx")
    assert wide_floats(report.path) == {"head.weight", NORM[0]}
    assert stored_bytes(report.path) <= result.plan.total_bytes <= 1.02 * stored_bytes(report.path) + 64


def test_a_folder_holds_it_in_float16_and_gives_the_same_model_and_file_back(tmp_path: Path) -> None:
    result = quantkit.quantize(perceptron(), "w8a8", ROWS, rules={"head": "float"}, **HALF)
    stored = load_file(result.save(tmp_path / "saved") / "weights.safetensors")
    assert stored["head.weight"].dtype == stored[NORM[0]].dtype == torch.float16
    assert stored["rows.2.bias"].dtype == stored["head.bias"].dtype == torch.float32
    loaded = quantkit.load(tmp_path / "saved", perceptron())
    assert torch.equal(outputs(loaded.model, ROWS), outputs(result.model, ROWS))
    files = [result.export_onnx(tmp_path / "a.onnx"), loaded.export_onnx(tmp_path / "b.onnx", example=ROWS)]
    files.append(result.to_real().export_onnx(tmp_path / "c.onnx"))
    assert len({report.path.read_bytes() for report in files}) == 1


def test_a_plan_says_it_and_is_applied_so() -> None:
    model = perceptron()
    profile = quantkit.profile(model, ROWS, schemes=["w2a8", "w8a8", "float"], progress=False, float_storage="float16")
    plan = quantkit.allocate(profile, "12 bits")
    assert any(scheme.is_float for scheme in plan.schemes.values())
    result = quantkit.apply(model, plan, ROWS, **QUICK)
    assert result.plan.provenance["float_storage"] == "float16" and result.plan.size_bytes == plan.size_bytes
    with pytest.raises(InvalidRequest, match=r"The plan promises .* bytes of weights, its schemes take"):
        quantkit.apply(model, plan, ROWS, float_storage="float32", **QUICK)


def test_a_plan_without_float_layers_may_be_applied_otherwise() -> None:
    plan = quantkit.quantize(perceptron(), "w4", ROWS, **HALF).plan
    result = quantkit.apply(perceptron(), plan, ROWS, float_storage="float32", **QUICK)
    assert "float_storage" not in result.plan.provenance and result.plan.total_bytes > plan.total_bytes


def test_limits_on_size_and_on_the_file_are_kept(tmp_path: Path) -> None:
    x, asked = ROWS, {"rules": {"head": "float"}, "schemes": ["w2", "w4"], **HALF}
    with pytest.raises(InfeasibleBudget) as refused:
        quantkit.quantize(perceptron(), "1 B", x, **asked)
    result = quantkit.quantize(perceptron(), f"{refused.value.smallest:g} B", x, **asked)
    report = result.export_onnx(tmp_path / "model.onnx")
    assert stored_bytes(report.path) <= result.plan.total_bytes == refused.value.smallest
    limit = report.file_bytes + 40
    result = quantkit.quantize(perceptron(), f"file_size={limit} B", x, **asked)
    assert result.export_onnx(tmp_path / "model.onnx").file_bytes <= limit


def test_a_float_table_is_looked_up_in_float16_and_stored_once(tmp_path: Path) -> None:
    class Table(Tied):
        """With a layer beside it, so that there is something to quantize."""

        def __init__(self) -> None:
            super().__init__()
            self.beside = nn.Linear(16, 16)

        def forward(self, tokens):
            return self.head(self.beside(self.table(tokens)))

    model, x = distinct(Table), torch.arange(24).reshape(4, 6)
    result = quantkit.apply(model, {"beside": "w8"}, x, **HALF)
    report = result.export_onnx(tmp_path / "model.onnx")
    tables = [t for t in initializers(report.path).values() if 40 in t.dims]
    assert [(t.data_type, tuple(t.dims)) for t in tables] == [(F16, (40, 16))]
    graph = onnx.load(report.path).graph
    assert [n.input[0] for n in graph.node if n.op_type == "Gather"] == [tables[0].name]
    assert stored_bytes(report.path) <= result.plan.total_bytes


class Stateful(nn.Module):
    """A counter that its forward moves, a table that its code computes, and a weight computed of others."""

    moved: Tensor
    table: Tensor
    saved: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moved", torch.full((64,), 0.1))
        self.register_buffer("table", torch.linspace(0, 1, 64), persistent=False)
        self.register_buffer("saved", torch.linspace(0, 2, 64))
        self.normed = parametrizations.weight_norm(nn.Linear(32, 64))
        self.last = nn.Linear(64, 8)

    def forward(self, x):
        self.moved.add_(0.001)
        return self.last(F.relu(self.normed(x)) * self.saved + self.table + self.moved)


def test_what_is_computed_or_updated_stays_as_it_is(tmp_path: Path) -> None:
    model, x = Stateful().eval(), randn(8, 32)
    given = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    result = quantkit.apply(model, {"last": "w8"}, x, **HALF)
    found = dict(result.quantized.model.named_buffers()) | dict(result.quantized.model.named_parameters())
    assert torch.equal(found["saved"], given["saved"].half().float())
    kept = ("moved", "table", *(name for name in found if "parametrizations" in name))
    assert all(torch.equal(found[name], given[name]) for name in kept if name in given)
    report = result.export_onnx(tmp_path / "model.onnx")
    assert stored_bytes(report.path) <= result.plan.total_bytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_computes_with_what_its_file_holds(dtype: torch.dtype, tmp_path: Path) -> None:
    model = perceptron().to(dtype)
    result = quantkit.apply(model, {"rows.0": "w8"}, ROWS, **HALF)
    wanted = outputs(twin(copy.deepcopy(model).float(), but=("rows.0.weight",)), ROWS)
    torch.testing.assert_close(outputs(result.model, ROWS), wanted, rtol=1e-2, atol=1e-2)  # w8 apart
    report = result.export_onnx(tmp_path / "model.onnx")
    assert wide_floats(report.path) == set()
    assert stored_bytes(report.path) <= result.plan.total_bytes <= 1.02 * stored_bytes(report.path) + 64


def test_a_float_layer_of_another_kind_runs_from_float16(tmp_path: Path) -> None:
    model, x = distinct(Decoder), NETWORKS["decoder"][1]
    result = quantkit.quantize(model, "w8a8", x, rules={"up": "float"}, **HALF)
    report = result.export_onnx(tmp_path / "model.onnx")
    assert initializers(report.path)["up.weight"].data_type == F16
    assert stored_bytes(report.path) <= result.plan.total_bytes <= 1.02 * stored_bytes(report.path) + 64


def test_another_word_is_refused_with_the_known_ones() -> None:
    for verb in (quantkit.quantize, quantkit.apply):
        budget = "w8a8" if verb is quantkit.quantize else {"head": "w8"}
        with pytest.raises(InvalidRequest, match=r"Unknown float_storage 'half'; known: float32, float16\."):
            verb(perceptron(), budget, ROWS, **QUICK, float_storage="half")
