"""The zoo keeps its word: every network runs at the sizes it claims, and its tables and blocks are what it says."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.program.architectures import ARCHITECTURES, FILES, Architecture, float_elements, floating_outputs
from tests.program.nets.entry import padding_mask

BLOCK = re.compile(
    "(AttentionBlock|EncoderBlock|SwinBlock|GPT2Block|T5Block|DecoderLayer|EncoderLayer|BertLayer|ViTLayer|SwinLayer)$"
)


def outputs_of(entry: Architecture, model: nn.Module, samples: int, length: int | None = None, seed: int = 0):
    """The model's outputs; buffers that its forward updates are put back."""
    args, kwargs = entry.batch(samples, length, seed)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        outputs = entry.output(model(*args, **kwargs))
    model.load_state_dict(state)
    return outputs


@pytest.fixture(params=ARCHITECTURES, scope="module")
def entry(request) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="module")
def model(entry) -> nn.Module:
    return entry.build()


def test_runs_at_every_size_that_it_claims(entry, model):
    for samples in (1, 2, 5):
        for length in entry.lengths or (None,):
            outputs = outputs_of(entry, model, samples, length)
            assert outputs
            assert all(torch.isfinite(output).all() for output in outputs)


def test_the_first_length_is_the_default(entry, model):
    if entry.lengths:
        torch.testing.assert_close(outputs_of(entry, model, 2), outputs_of(entry, model, 2, entry.lengths[0]))


def test_outputs_follow_the_inputs(entry, model):
    for first, second in zip(outputs_of(entry, model, 3), outputs_of(entry, model, 3, seed=9), strict=True):
        assert not torch.allclose(first, second, atol=1e-3)


def test_built_in_eval_mode_from_the_same_numbers_without_touching_the_generator(entry, model):
    before = torch.random.get_rng_state()
    again = entry.build()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(module.training for module in again.modules())
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_blocks_are_counted_by_class(entry, model):
    assert sum(bool(BLOCK.search(type(module).__name__)) for module in model.modules()) == entry.blocks


def test_added_tables_are_parameters_of_two_or_more_dimensions(entry, model):
    parameters = dict(model.named_parameters())
    for name in entry.added_tables:
        assert parameters[name].dim() >= 2
        assert parameters[name].is_floating_point()
    assert float_elements(model, entry.added_tables) <= float_elements(model)


@pytest.mark.parametrize("name", ["bert", "gpt2_eager_padded", "llama_padded", "llama_eager_padded", "t5"])
def test_padding_is_masked(name):
    """What stands under the mask changes nothing that is read."""
    entry = ARCHITECTURES[name]
    model = entry.build()
    _, inputs = entry.batch(3)
    mask = inputs["attention_mask"].bool()
    changed = inputs | {"input_ids": inputs["input_ids"].where(mask, (inputs["input_ids"] + 1) % 31)}
    with torch.no_grad():
        unmasked = {key: value for key, value in inputs.items() if key != "attention_mask"}
        first, second, unmasked = (model(**batch).logits for batch in (inputs, changed, unmasked))
    read = mask if first.shape[:2] == mask.shape else slice(None)
    torch.testing.assert_close(first[read], second[read])
    assert not torch.allclose(first[read], unmasked[read], atol=1e-3)


def test_padding_mask_hides_at_least_one_and_keeps_at_least_one():
    for samples in range(1, 8):
        for length in range(2, 7):
            kept = padding_mask(samples, length).sum(1)
            assert kept.min() >= 1
            assert kept.max() == length - 1


def test_float_elements_count_ties_once_and_leave_out_what_is_named():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    assert float_elements(model) == 20 + 20 + 15
    assert float_elements(model, ("3.weight",)) == 40

    model[1].weight = model[0].weight
    assert float_elements(model) == 20 + 15
    model[1].weight = nn.Parameter(model[0].weight.data)
    assert float_elements(model) == 20 + 15

    model.register_parameter("numbers", nn.Parameter(torch.ones(2, 2, dtype=torch.long), requires_grad=False))
    assert float_elements(model) == 20 + 15


def test_floating_outputs_are_found_in_any_container():
    @dataclass
    class Result:
        a: Tensor
        b: dict[str, object]

    one, two, number = torch.ones(1), torch.zeros(2), torch.tensor(3)
    found = floating_outputs([Result(one, {"x": number, "y": (two, None)}), "text"])
    assert [id(tensor) for tensor in found] == [id(one), id(two)]


def test_no_builder_imports_quantkit():
    for file in FILES:
        for node in ast.walk(ast.parse(Path(file.__file__).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "quantkit" for name in names)


def test_spectral_norm_settled_in_training():
    """The largest singular value of every weight is one, as after training."""
    for name in ("spectral_norm_by_hook", "spectral_norm_parametrized"):
        model = ARCHITECTURES[name].build()
        with torch.no_grad():
            ARCHITECTURES[name].output(model(*ARCHITECTURES[name].batch(1)[0]))
        for layer in (model[0], model[2], model[5]):
            assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2) == pytest.approx(1, abs=0.1)
