"""What the matrices inside a recurrent call multiply, against cells that are stepped by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.program.record import record
from quantkit.ranges.statistics import layer_hessians
from quantkit.simulation.model import as_float
from tests.program.models import Net, randn


def rows_by_hand(model: nn.RNNBase, cell: type[nn.RNNCellBase], x: Tensor) -> dict[str, Tensor]:
    """The rows that each matrix multiplies, from cells with the model's parameters; x (steps, batch, inputs)."""
    found: dict[str, Tensor] = {}
    for layer in range(model.num_layers):
        made = []
        for suffix in ("", "_reverse")[: 2 if model.bidirectional else 1]:
            one = cell(x.shape[-1], model.hidden_size)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(one, name).data.copy_(getattr(model, f"{name}_l{layer}{suffix}"))
            state = torch.zeros(x.shape[1], model.hidden_size)
            memory, read, out = torch.zeros_like(state), [], []
            for step in x.flip(0) if suffix else x:
                read.append(state)
                if cell is nn.LSTMCell:
                    state, memory = one(step, (state, memory))
                else:
                    state = one(step, state)
                out.append(state)
            found[f"rnn.weight_ih_l{layer}{suffix}"] = x.flatten(0, 1)
            found[f"rnn.weight_hh_l{layer}{suffix}"] = torch.cat(read)
            made.append(torch.stack(out).flip(0) if suffix else torch.stack(out))
        x = torch.cat(made, dim=-1)
    return found


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@torch.no_grad()
def test_rows_are_those_of_cells(kind: str, bidirectional: bool) -> None:
    rnn = getattr(nn, kind)(3, 4, 2, batch_first=True, bidirectional=bidirectional)
    model = Net(lambda self, x: self.rnn(x)[0], rnn=rnn).eval()
    x = randn(5, 6, 3)
    program = record(model, ((x[:2],), {}))
    found = layer_hessians(as_float(model), program, list(program.kinds), [((x,), {})])
    wanted = rows_by_hand(rnn, getattr(nn, f"{kind}Cell"), x.transpose(0, 1))
    assert found.keys() == wanted.keys()
    for name, rows in wanted.items():
        torch.testing.assert_close(found[name].hessian[0], (rows.T @ rows).double(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_of_a_cell() -> None:
    model = Net(lambda self, x, h: self.cell(x, h), cell=nn.GRUCell(3, 4)).eval()
    x, h = randn(5, 3), randn(5, 4)
    program = record(model, ((x[:2], h[:2]), {}))
    found = layer_hessians(as_float(model), program, list(program.kinds), [((x, h), {})])
    for name, rows in (("cell.weight_ih", x), ("cell.weight_hh", h)):
        torch.testing.assert_close(found[name].hessian[0], (rows.T @ rows).double())


def test_matrices_of_a_recurrence_are_rounded_by_what_they_multiply() -> None:
    torch.manual_seed(0)
    model = Net(lambda self, x: self.rnn(x)[0], rnn=nn.LSTM(8, 6, 2, batch_first=True)).eval()
    x = randn(64, 5, 3) @ randn(3, 8)  # inputs that tell much about each other
    wanted, errors = model(x), {}
    for rounding in ("nearest", "gptq"):
        result = quantkit.apply(
            model, {"rnn.weight_ih_l0": "w3", "rnn.weight_ih_l1": "w3"}, x, rounding=rounding, reconstruction="none",
            correction=None, progress=False,
        )  # fmt: skip
        errors[rounding] = float((result.model(x) - wanted).detach().square().mean())
    assert all(how.startswith("gptq") for how in result.notes["rounding"].values())
    assert errors["gptq"] < 0.5 * errors["nearest"]
