"""Calls on tensors in half precision compute in float32, and leave what is stored as it is stored."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from quantkit.program import halves, inputs
from quantkit.program.halves import is_half, keep_only_matrices_half
from quantkit.program.inputs import digest_model, pieces
from quantkit.program.intercept import computing
from quantkit.program.record import record

HALVES = (torch.bfloat16, torch.float16)


class Mixed(nn.Module):
    """Types named in the code, views and slices of parameters, buffers that are written to."""

    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.packed = nn.Parameter(torch.randn(24, 8))
        self.norm = nn.LayerNorm(8)
        self.register_buffer("cache", torch.zeros(5, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.position[:, : ids.shape[1]]
        x = self.norm(x.to(self.packed.dtype)).type_as(self.packed)
        q, k, _ = (F.linear(x, part) for part in self.packed.chunk(3))
        room = torch.zeros(q.shape, dtype=self.packed.dtype)
        room[:, 1:] = q[:, 1:]
        room += k @ self.packed[:8].t()
        self.cache.index_copy_(0, torch.arange(ids.shape[1]), room[0])
        return room


def stored_in(dtype: torch.dtype, model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A model in half precision, and the float32 model with the same weights."""
    torch.manual_seed(0)
    own, twin = model.to(dtype).eval(), type(model)().eval()
    twin.load_state_dict(own.state_dict())
    keep_only_matrices_half(own)
    return own, twin


@pytest.mark.parametrize("dtype", HALVES)
def test_computes_what_the_float32_model_computes(dtype):
    own, twin = stored_in(dtype, Mixed())
    ids = torch.tensor([[1, 4, 9], [0, 10, 2]])
    with torch.no_grad(), computing(own):
        found = own(ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, twin(ids), rtol=1e-6, atol=1e-6)


def test_matrices_stay_in_half_precision_and_vectors_do_not():
    own, _ = stored_in(torch.bfloat16, Mixed())
    assert {name for name, tensor in own.state_dict().items() if is_half(tensor)} == {
        "table.weight", "position", "packed", "cache",
    }  # fmt: skip


def test_what_is_written_to_keeps_its_type_and_gets_the_values():
    own, twin = stored_in(torch.bfloat16, Mixed())
    ids = torch.tensor([[1, 4, 9]])
    with torch.no_grad(), computing(own):
        own(ids)
        twin(ids)
    assert own.get_buffer("cache").dtype == torch.bfloat16
    torch.testing.assert_close(own.get_buffer("cache"), twin.get_buffer("cache").bfloat16())


def test_a_float32_model_is_called_as_it_is():
    _, twin = stored_in(torch.bfloat16, Mixed())
    program = record(twin, ((torch.tensor([[1, 4]]),), {}))
    assert not any(hasattr(step.func, "__wrapped__") for step in program.steps)


def test_a_recording_finds_the_same_layers_in_slices_and_views():
    own, twin = stored_in(torch.bfloat16, Mixed())
    batch = (torch.tensor([[1, 4, 9], [0, 10, 2]]),), {}
    found, wanted = record(own, batch), record(twin, batch)
    assert found.weights == wanted.weights
    assert found.calls == wanted.calls
    assert found.shape == wanted.shape


@pytest.mark.parametrize("narrowed", (Tensor.half, Tensor.bfloat16, lambda x: x.to(torch.float16)))
def test_types_that_the_code_names_round_nothing(narrowed):
    class Narrowing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return narrowed(super().forward(x))

    model = Narrowing(3, 3).bfloat16()
    keep_only_matrices_half(model)
    x = torch.randn(2, 3)
    with torch.no_grad(), computing(model):
        found = model(x)
    torch.testing.assert_close(found, F.linear(x, model.weight.float(), model.bias), rtol=1e-6, atol=1e-6)


class Alive(TorchDispatchMode):
    """Counts the elements of float32 copies of matrices in half precision that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[weakref.ref] = []
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and is_half(args[0]):
            self.copies.append(weakref.ref(result))
        self.most = max(self.most, sum(x.numel() for ref in self.copies if (x := ref()) is not None))
        return result


@pytest.mark.parametrize("limit", (1 << 23, 512))
def test_one_weight_is_widened_at_a_time(limit, monkeypatch):
    monkeypatch.setattr(halves, "LINEAR_ELEMENTS", limit)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 100, bias=False)).bfloat16()
    keep_only_matrices_half(model)
    x = torch.randn(2, 16)
    with torch.no_grad(), Alive() as alive, computing(model):
        found = model(x)
    assert alive.most == min(64 * 100, limit)
    torch.testing.assert_close(found, model.float()(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", ((), (0, 3), (7,), (5, 1), (1, 13), (3, 2, 9)))
@pytest.mark.parametrize("most", (1, 4, 100))
def test_pieces_are_the_tensor_in_order(shape, most, monkeypatch):
    monkeypatch.setattr(inputs, "PIECE", most)
    tensor = torch.randn(shape)
    found = list(pieces(tensor))
    assert torch.equal(torch.cat([tensor.new_empty(0), *(x.reshape(-1) for x in found)]), tensor.reshape(-1))
    assert all(x.numel() <= most for x in found)


def test_the_digest_of_a_model_does_not_depend_on_the_pieces(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(4, 6).bfloat16()).to(memory_format=torch.channels_last)
    whole = digest_model(model)
    monkeypatch.setattr(inputs, "PIECE", 7)
    assert digest_model(model) == whole
