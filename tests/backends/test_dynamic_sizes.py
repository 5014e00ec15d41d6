"""Files that take every size that varies: which sizes do, what they are called, and that the file computes what the
simulated model computes at sizes that it never saw.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantkit
from quantkit import Result
from quantkit.backends.onnxruntime.dynamic import Asked, DynamicSizes
from quantkit.backends.onnxruntime.parity import DEFAULT_TOLERANCE, measure_parity, require_parity
from quantkit.errors import InvalidRequest
from quantkit.program.inputs import as_batch
from tests.program.models import randn

VOCABULARY = 50


class Sentences(nn.Module):
    """Attention over tokens with a mask, and a class for each sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.query, self.key, self.value, self.head = (nn.Linear(16, size) for size in (16, 16, 16, 3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        scores = self.query(x) @ self.key(x).transpose(-1, -2) / 4 + (1.0 - attention_mask[:, None].float()) * -1e4
        return self.head((x + scores.softmax(-1) @ self.value(x))[:, 0])


class Translation(nn.Module):
    """Reads two texts, of which each has its length."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.query, self.key, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        query, key = self.query(self.embedding(decoder_input_ids)), self.key(self.embedding(input_ids))
        return self.head((query @ key.transpose(1, 2)).softmax(-1) @ key)


class Signals(nn.Module):
    """Convolutions over time, and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 8, 5, padding=2), nn.Conv1d(8, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, signal: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(signal)))).mean(-1))


class Halves(nn.Module):
    """As a U-Net: halves an image, doubles it again and joins it with what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.inner, self.up = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 8), (16, 3)))

    def forward(self, image: Tensor) -> Tensor:
        whole = F.relu(self.down(image))
        inner = F.relu(self.inner(F.max_pool2d(whole, 2)))
        return self.up(torch.cat([whole, F.interpolate(inner, scale_factor=2.0)], 1))


class Written(nn.Module):
    """Writes the size of its images out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 3 * 3, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(F.max_pool2d(F.relu(self.conv(image)), 4).view(-1, 8 * 3 * 3))


class Columns(nn.Module):
    """Weighs the columns of an image, however many rows it has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.columns = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(12, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.columns(F.relu(self.conv(image)))


class Padded(nn.Module):
    """Pads the height to a multiple of 8 where it is none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[2] % 8:
            image = F.pad(image, (0, 0, 0, 8 - image.shape[2] % 8))
        return self.second(F.relu(self.first(image)))


class Positions(nn.Module):
    """Adds positions from a table of 12."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.table = nn.Parameter(torch.randn(1, 12, 16))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.embedding(ids) + self.table[:, : ids.shape[1]])))


def tokens(count: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(length))


def sentences(count: int, length: int) -> dict[str, Tensor]:
    mask = torch.ones(count, length, dtype=torch.long)
    mask[:, -2:] = 0
    return {"input_ids": tokens(count, length), "attention_mask": mask}


def pair(count: int, length: int, other: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(count, length), "decoder_input_ids": tokens(count, other)}


def pictures(count: int, height: int, width: int) -> Tensor:
    return randn(count, 3, height, width, seed=height)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, initializer_range=0.3, **sizes)
    return transformers.BertForSequenceClassification(config)


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, intermediate_size=24, initializer_range=0.3, use_cache=False, **sizes
    )
    return transformers.LlamaForCausalLM(config)


def quantized(model: nn.Module, calibration: list[Any], scheme: str = "w8a8") -> Result:
    torch.manual_seed(0)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    options = {"rounding": "nearest", "reconstruction": "none", "correction": None, "progress": False}
    return quantkit.apply(model.eval(), dict.fromkeys(layers, scheme), calibration, **options)


def require_the_same(result: Result, path: Path, *unseen: Any) -> None:
    for item in unseen:
        require_parity(measure_parity(path, result.simulated(), [as_batch(item)]), DEFAULT_TOLERANCE)


def inputs_of(path: Path) -> dict[str, list[str | int]]:
    values = onnx.load(path).graph.input
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


TEXT = {0: "batch", 1: "sequence"}
IMAGE = {0: "batch", 2: "height", 3: "width"}
VARYING = {
    "sentences": (
        Sentences, [sentences(4, 12), sentences(4, 20), sentences(3, 16)], "w8a8",
        [sentences(2, 7), sentences(1, 33)], {"attention_mask": TEXT, "input_ids": TEXT},
    ),
    "weights alone": (
        Sentences, [sentences(4, 12), sentences(4, 20)], "w4", [sentences(2, 7)],
        {"attention_mask": TEXT, "input_ids": TEXT},
    ),
    "two texts": (
        Translation, [pair(4, 12, 12), pair(4, 20, 16)], "w8a8", [pair(2, 7, 5), pair(1, 5, 30)],
        {"decoder_input_ids": TEXT, "input_ids": {0: "batch", 1: "input_ids_sequence"}},
    ),
    "signals": (
        Signals, [randn(4, 2, 40), randn(4, 2, 64), randn(4, 2, 51)], "w4a8", [randn(2, 2, 33), randn(1, 2, 100)],
        {"signal": {0: "batch", 2: "sequence"}},
    ),
    "images": (
        Halves, [pictures(4, 12, 12), pictures(4, 16, 20)], "w8a8", [pictures(2, 22, 10), pictures(1, 8, 8)],
        {"image": IMAGE},
    ),
    "bert": (
        bert, [sentences(4, 12), sentences(4, 20)], "w8a8", [sentences(2, 7), sentences(1, 30)],
        {"attention_mask": TEXT, "input_ids": TEXT},
    ),
    "llama": (
        llama, [tokens(4, 12), tokens(4, 20)], "w4a8", [tokens(2, 7), tokens(1, 30)], {"input_ids": TEXT},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("bert", "llama") else n for n in VARYING]
)
def test_sizes_that_vary_in_the_calibration_data_vary_in_the_file(name: str, tmp_path: Path) -> None:
    build, calibration, scheme, unseen, dynamic = VARYING[name]
    torch.manual_seed(0)
    result = quantized(build(), calibration, scheme)
    report = result.export_onnx(tmp_path / "model.onnx")
    assert report.dynamic == dynamic
    assert report.dynamic_batch
    shapes = inputs_of(report.path)
    assert {n: {i: d for i, d in enumerate(shape) if isinstance(d, str)} for n, shape in shapes.items()} == dynamic
    require_the_same(result, report.path, *calibration, *unseen)


def test_a_size_that_the_user_names_varies(tmp_path: Path) -> None:
    result = quantized(Halves(), [pictures(4, 12, 12)])
    report = quantkit.export_onnx(result, tmp_path / "model.onnx", dynamic={"image": {-2: "rows", 3: "columns"}})
    assert report.dynamic == {"image": {0: "batch", 2: "rows", 3: "columns"}}
    assert report.conditions == ("2*(rows//2) == rows", "2*(columns//2) == columns")
    assert [d.dim_param for d in onnx.load(report.path).graph.output[0].type.tensor_type.shape.dim] == [
        "batch", "", "rows", "columns"
    ]  # fmt: skip
    require_the_same(result, report.path, pictures(2, 22, 10))
    with pytest.raises(InvalidRequest, match=r"Batch 1 of check= .*2\*\(rows//2\) == rows, and is given .*rows 13"):
        result.export_onnx(
            tmp_path / "other.onnx", dynamic={"image": {2: "rows", 3: "columns"}},
            check=[pictures(2, 14, 12), pictures(2, 13, 12)],
        )  # fmt: skip
    assert not (tmp_path / "other.onnx").exists()


def test_a_size_that_the_code_fixes_does_not_fix_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = quantized(Columns(), [pictures(4, 12, 12)])
    with pytest.raises(InvalidRequest, match=r"dynamic= asks that axis 3 of 'image' \('width', 12 in the example\)"):
        result.export_onnx(tmp_path / "no.onnx", dynamic={"image": {3: "width"}})
    assert not list(tmp_path.iterdir())
    report = result.export_onnx(tmp_path / "model.onnx", dynamic={"image": {2: "height"}})
    assert inputs_of(report.path) == {"image": ["batch", 3, "height", 12]}
    require_the_same(result, report.path, pictures(2, 31, 12))


def test_images_of_a_size_that_is_written_out(tmp_path: Path) -> None:
    """They run at another size, and give rows that belong to no image."""
    result = quantized(Written(), [pictures(4, 12, 12)])
    with pytest.raises(InvalidRequest, match=r"'height'.*\(for 4 samples of another size it returns 16 rows\)"):
        result.export_onnx(tmp_path / "no.onnx", dynamic={"image": {2: "height", 3: "width"}})
    assert not list(tmp_path.iterdir())


def test_a_branch_on_a_size_fixes_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = quantized(Padded(), [pictures(4, 12, 12), pictures(4, 16, 20)])
    with caplog.at_level(logging.INFO, logger="quantkit"):
        report = result.export_onnx(tmp_path / "model.onnx")
    assert report.dynamic == {"image": {0: "batch", 3: "width"}}
    assert "takes 12 along axis 2 of 'image' only" in caplog.text
    assert "Mod(image.shape[2], 8) != 0" in caplog.text
    require_the_same(result, report.path, pictures(2, 12, 9))
    with pytest.raises(InvalidRequest, match=r"Batch 0 of check= .* axis 2 of 'image' is 16, .* takes 12 only"):
        result.export_onnx(tmp_path / "other.onnx", check=[pictures(2, 16, 12)])


def test_a_longest_sequence_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = quantized(Positions(), [tokens(4, 12)])
    with caplog.at_level(logging.INFO, logger="quantkit"):
        report = result.export_onnx(tmp_path / "model.onnx", dynamic={"ids": {1: "length"}})
    assert report.conditions == ("length <= 12",)
    assert "takes sizes with length <= 12" in caplog.text
    require_the_same(result, report.path, tokens(2, 5))


def test_a_saved_result_lets_the_same_sizes_vary(tmp_path: Path) -> None:
    calibration = [sentences(4, 12), sentences(4, 20)]
    result = quantized(Sentences(), calibration)
    result.save(tmp_path)
    loaded = quantkit.load(tmp_path, Sentences())
    assert loaded.shapes == result.shapes
    report = loaded.export_onnx(tmp_path / "loaded.onnx", example=sentences(3, 9))
    assert report.dynamic == {"attention_mask": TEXT, "input_ids": TEXT}
    require_the_same(result, report.path, *calibration)
    assert quantized(Halves(), [pictures(4, 12, 12), pictures(3, 12, 12)]).shapes == ()  # only their number varies


REFUSED: dict[str, tuple[Any, str]] = {
    "no such input": ({"input": {1: "sequence"}}, "the input 'input', which the model does not take.*Did you mean"),
    "no such axis": ({"input_ids": {2: "sequence"}}, r"axis 2 of 'input_ids', which has 2 axes.*\(4, 12\)"),
    "no axes": ({"input_ids": "sequence"}, "gives 'input_ids' 'sequence': give it axes with names"),
    "no word": ({"input_ids": {1: "2*n"}}, r"calls axis 1 of 'input_ids' '2\*n': a size is called by a word"),
    "one name for two": ({"input_ids": {0: "n", 1: "n"}}, "are 4 and 12: sizes that may differ need two names"),
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_cannot_be_meant_is_refused_at_once(asked: str) -> None:
    named, message = REFUSED[asked]
    with pytest.raises(InvalidRequest, match=message):
        Asked.of(Sentences(), as_batch(sentences(4, 12)), DynamicSizes(named))


def test_what_has_to_follow_another_input_is_said(tmp_path: Path) -> None:
    result = quantized(Sentences(), [sentences(4, 12)])
    wanted = re.escape("where 'attention_mask' axis 1 follows it, name that too")
    with pytest.raises(InvalidRequest, match=wanted):
        result.export_onnx(tmp_path / "no.onnx", dynamic={"input_ids": {1: "sequence"}})
    both = {"input_ids": {1: "length"}, "attention_mask": {1: "length"}}
    report = result.export_onnx(tmp_path / "model.onnx", dynamic=both)
    assert {axes[1] for axes in report.dynamic.values()} == {"length"}
    require_the_same(result, report.path, sentences(2, 7))
