"""What goes into a file and comes out of it: names, nested values, integers, and inputs that are handed back."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from quantkit.backends.onnxruntime.writer import ExportOptions, ExportReport, export_onnx
from quantkit.errors import InvalidRequest, ParityError
from quantkit.program.inputs import Batch
from quantkit.simulation.model import SimulatedModel
from tests.backends.helpers import prepared, simulate
from tests.program.models import randn


class Convolutions(nn.Module):
    """Two convolutions and what ``answer`` makes of the second one's scores."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, channels, 3, padding=1)

    def scores(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


X = randn(6, 3, 8, 8)
K = randn(6, 1, 8, 8).abs()


def exported(model: nn.Module, *inputs: Tensor, folder: Path, bits: int = 8) -> tuple[SimulatedModel, ExportReport]:
    batch = (inputs, {})
    simulated = simulate(prepared(model.eval(), batch), batch, bits)
    return simulated, export_onnx(simulated, batch, folder / "m.onnx")


def results(path: Path, *inputs: Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


class SameKey(Convolutions):
    def forward(self, image):
        return {"image": self.scores(image)}


class NamedOutput(Convolutions):
    def forward(self, output):
        return self.scores(output)


class MaskBack(Convolutions):
    def forward(self, image, mask):
        return {"out": self.scores(image) * mask, "mask": mask}


class DottedKeys(Convolutions):
    def forward(self, x):
        y = self.scores(x)
        return {"a.b": y, "a": {"b": y * 2}}


@pytest.mark.parametrize(
    ("kind", "inputs", "names", "renamed"),
    [
        (SameKey, (X,), ["image.output"], "image"),
        (NamedOutput, (X,), ["output.output"], "output"),
        (MaskBack, (X, K), ["out", "mask.output"], "mask"),
        (DottedKeys, (X,), ["a.b", "a.b.output"], "a.b"),
    ],
)
def test_names_that_clash_are_made_different_and_said(
    kind: type[Convolutions], inputs, names: list[str], renamed: str, tmp_path: Path, caplog
) -> None:
    with caplog.at_level(logging.INFO, "quantkit"):
        _, report = exported(kind(), *inputs, folder=tmp_path)
    assert list(results(report.path, *inputs)) == names
    assert f"output {renamed!r} has the name of another tensor" in caplog.text


@dataclass
class Detections:
    scores: Tensor
    boxes: tuple[Tensor, Tensor]
    loss: Tensor | None = None


class ReturnsDataclass(Convolutions):
    def forward(self, x):
        y = self.scores(x)
        return Detections(y.mean((2, 3)), (y, y * 2))


class ReturnsModelOutput(Convolutions):
    def forward(self, x):
        outputs = pytest.importorskip("transformers.modeling_outputs")
        y = self.scores(x)
        return outputs.BaseModelOutput(last_hidden_state=y, hidden_states=(y * 2,))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (ReturnsDataclass, ["scores", "boxes.0", "boxes.1"]),
        (ReturnsModelOutput, ["last_hidden_state", "hidden_states.0"]),
    ],
)
def test_records_are_outputs(kind: type[Convolutions], names: list[str], tmp_path: Path) -> None:
    _, report = exported(kind(), X, folder=tmp_path)
    assert list(results(report.path, X)) == names
    assert [one.output for one in report.parity] == names * 2


class Back(Convolutions):
    def forward(self, x):
        return self.scores(x), x


class BackInside(Convolutions):
    def forward(self, x):
        return {"seen": [x], "scores": self.scores(x) + self.a(x)[:, :3]}


@pytest.mark.parametrize(("kind", "name"), [(Back, "output.1"), (BackInside, "seen.0")])
def test_an_input_that_is_handed_back_is_untouched(kind: type[Convolutions], name: str, tmp_path: Path) -> None:
    batch = ((X,), {})
    simulated = simulate(prepared(kind().eval(), batch), batch, 8, site_bits=4)
    first = simulated.sites[0]
    assert first.name == "input" and first.place.output < 0  # quantized by the calls that read it
    report = export_onnx(simulated, batch, tmp_path / "m.onnx")
    assert np.array_equal(results(report.path, X)[name], X.numpy())
    found = simulated(X)
    assert torch.equal(found[1] if kind is Back else found["seen"][0], X)


class ArgMax(Convolutions):
    """A class for each pixel, beside its scores."""

    def forward(self, x):
        y = self.scores(x)
        return y, y.argmax(1)


class TopK(Convolutions):
    """The places of the largest scores, of which many are equal, and boxes picked by them."""

    def forward(self, x):
        y = self.scores(x)
        _, places = y[:, 0].flatten(1).topk(30)
        boxes = y[:, 1:].flatten(2).transpose(1, 2)
        return places, torch.gather(boxes, 1, places[..., None].expand(-1, -1, 2)), y


class Threshold(Convolutions):
    def forward(self, x):
        y = self.scores(x)
        return y > 0.1, y


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [ArgMax, TopK, Threshold])
def test_integer_outputs_are_compared_by_agreement(kind: type[Convolutions], bits: int, tmp_path: Path) -> None:
    batch = ((X,), {})
    simulated = simulate(prepared(kind().eval(), batch), batch, 8, site_bits=bits)
    report = export_onnx(simulated, batch, tmp_path / "m.onnx")
    assert len(report.parity) == 2 * len(results(report.path, X))


class Shifted(TopK):
    """The places are those of the next pixels."""

    def forward(self, x):
        places, boxes, y = super().forward(x)
        return (places + 1) % 64, boxes, y


class OtherScores(TopK):
    def forward(self, x):
        places, boxes, y = super().forward(x)
        return places, boxes, y * 1.05


@pytest.mark.parametrize(("kind", "output"), [(Shifted, "output.0"), (OtherScores, "output.2")])
def test_ties_hide_no_other_fault(kind: type[Convolutions], output: str, tmp_path: Path) -> None:
    batch = ((X,), {})
    right = simulate(prepared(TopK().eval(), batch), batch, 8)
    wrong = simulate(prepared(kind().eval(), batch), batch, 8)
    from quantkit.backends.onnxruntime.marks import mark_graph

    graph = mark_graph(wrong, batch)
    with pytest.raises(ParityError, match=f"output '{output}'"):
        export_onnx(right, batch, tmp_path / "m.onnx", ExportOptions(graph=graph))


class OnlyClasses(Convolutions):
    def forward(self, x):
        return self.scores(x).argmax(1)


class OnlyMasks(Convolutions):
    def forward(self, x):
        return {"mask": self.scores(x) > 0.1}


@pytest.mark.parametrize("kind", [OnlyClasses, OnlyMasks])
def test_models_without_a_floating_output_are_refused_with_the_way_out(kind: type[Convolutions]) -> None:
    import quantkit

    with pytest.raises(InvalidRequest, match=r"no floating-point tensor \(.*return scores, scores\.argmax"):
        quantkit.quantize(kind().eval(), "6 bits", X, progress=False)


@pytest.mark.parametrize("layers", [3, 4])
def test_a_file_of_eight_bits_loads_in_the_precise_mode(layers: int, tmp_path: Path) -> None:
    linear = [part for _ in range(layers) for part in (nn.Linear(16, 16), nn.ReLU())]
    batch = ((randn(8, 16),), {})
    simulated = simulate(prepared(nn.Sequential(*linear), batch), batch, 8)
    report = export_onnx(simulated, batch, tmp_path / "m.onnx", ExportOptions(instruction_set="vnni"))
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    onnxruntime.InferenceSession(str(report.path), options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in onnx.load(report.path).graph.initializer]
    assert sum(name.endswith("weight_zero_point") for name in names) == layers


class Keywords(nn.Module):
    """Takes two inputs in another order than that of their names, and is exported by its program: ``len`` has lost
    that it follows the batch.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        return self.one(query).reshape(len(query), 2, 3) - self.two(memory).reshape(len(query), 2, 3).relu()


def test_keywords_keep_their_names_in_a_model_exported_by_its_program(tmp_path: Path) -> None:
    batch: Batch = ((), {"memory": randn(6, 4, seed=1), "query": randn(6, 4, seed=2)})
    report = export_onnx(simulate(prepared(Keywords().eval(), batch), batch, 8), batch, tmp_path / "m.onnx")
    assert report.dynamic == {"memory": {0: "batch"}, "query": {0: "batch"}}
    assert max(one.relative_error for one in report.parity) < 1e-5
