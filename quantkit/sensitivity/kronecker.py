"""Kronecker factors of the Hessian of a network's damage, for rounding that minds the whole network.

The damage to a float network has as its Hessian the Fisher information: E vec(G) vec(G)^T, G the gradient of the
log-likelihood of labels drawn from the network's own outputs by a layer's weight, over all rows of a sample. The
nearest Kronecker product H_out (x) H_in is found by power iteration (Tseng et al., arXiv 2505.22988, sketch B):

    H_in = E G^T G,  H_out = E G G^T;  then  H_in <- E G^T H_out^-1 G,  H_out <- E G H_in^-1 G^T

with gradients drawn anew: two forward passes over the samples in all, whatever the number of formats, and a backward
pass for every draw of labels, several where there are few rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.program.arguments import leaves_of
from quantkit.program.inputs import Batch, batch_size, split_batches
from quantkit.program.intercept import OpKey
from quantkit.program.layers import LayerWeight
from quantkit.program.program import Program
from quantkit.program.updates import restored
from quantkit.progress import track
from quantkit.rounding.moments import Moments, damped
from quantkit.sensitivity.curvature import differentiable
from quantkit.sensitivity.damage import Damage
from quantkit.sensitivity.output_gradients import gradients
from quantkit.simulation.model import run_with

DAMPING = 0.1  # of the mean diagonal, where a factor is inverted
PASSES = 2
ROWS_WANTED, MOST_DRAWS = 1 << 15, 4  # rows of outputs with labels of their own: fewer are drawn for several times
GRAPH_ROWS = 1024  # of a graph: positions of the samples that are differentiated at once
_EMBEDDING = "embedding"


@dataclass(frozen=True)
class FisherInputs:
    """What gradients are taken of: a float model on its program, its batches and its damage."""

    model: nn.Module
    program: Program
    batches: Sequence[Batch]
    damage: Damage


def layers_with_factors(program: Program, layers: Sequence[str], most: int) -> list[str]:
    """The layers that have factors of at most ``most`` bytes: those that multiply rows once, but for what makes an
    output of the model, where the Hessian of the divergence is no Kronecker product; and tables that are looked up.
    """
    return [name for name in layers if _has_factors(program, name, most)]


def _has_factors(program: Program, name: str, most: int) -> bool:
    weight, calls = program.weights[name], program.calls.get(name, ())
    alone = all(sum(call.key == other.key for own in program.calls.values() for other in own) == 1 for call in calls)
    if not calls or not alone or factor_bytes(weight) > most:
        return False
    if weight.kind == _EMBEDDING:  # and not a head too
        return weight.order is None and all(call.key.op.startswith(_EMBEDDING) for call in calls)
    rows = weight.reads_rows and weight.kind in ("linear", "matmul")
    return rows and len(calls) == 1 and calls[0].output not in program.outputs


def factor_bytes(weight: LayerWeight) -> int:
    """Bytes of both factors of a layer."""
    outputs, inputs = weight.shape[0], weight.shape[1]
    return 8 * (inputs**2 + (0 if weight.kind == _EMBEDDING else outputs**2))


def kronecker_moments(
    given: FisherInputs, layers: Sequence[str], generator: torch.Generator, progress: bool = True
) -> dict[str, Moments]:
    """The factors of ``layers``, float64, up to a factor. Of an embedding there is that of its columns alone: its rows
    are looked up one at a time.

    Memory: two pairs of factors of each layer, and the graph of a few samples.
    """
    found: dict[str, Moments] = {}
    for _ in range(PASSES):
        sums = _Sums(given.program, {name: _inverse(moments) for name, moments in found.items()})
        for batch in track(list(_pieces(given)), "Fisher information", enabled=progress):
            _add_gradients(given, layers, batch, sums, generator)
        found = sums.moments
    return found


def _pieces(given: FisherInputs) -> Iterator[Batch]:
    """The batches in pieces whose graph fits into memory."""
    rows = sum(given.damage.counts) // max(1, sum(map(batch_size, given.batches)))
    yield from split_batches(given.batches, max(1, GRAPH_ROWS // max(1, rows)))


def draws_for(rows: int) -> int:
    """How often labels are drawn for so many rows of outputs."""
    return max(1, min(MOST_DRAWS, ROWS_WANTED // max(1, rows)))


def _inverse(moments: Moments) -> tuple[Tensor, Tensor | None]:
    sides = (moments.hessian, moments.output)
    one, other = (None if x is None else torch.linalg.inv(damped(x, DAMPING))[0].float() for x in sides)
    assert one is not None
    return one, other


def _add_gradients(
    given: FisherInputs, layers: Sequence[str], batch: Batch, sums: _Sums, generator: torch.Generator
) -> None:
    """Add the gradients of a batch by the weights of ``layers``, for labels drawn anew, once or several times."""
    calls = {call.key: (name, call.source) for name in layers for call in given.program.calls[name]}
    read: dict[OpKey, Tensor] = {}
    made: dict[OpKey, Tensor] = {}

    def before(key: OpKey, args: Any, kwargs: Any) -> None:
        if key in calls:
            tensors = [leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)]
            read[key] = tensors[calls[key][1]].detach()

    def at_output(key: OpKey, x: Tensor) -> Tensor:
        return x + made.setdefault(key, torch.zeros_like(x).requires_grad_()) if key in calls else x

    draws = draws_for(sum(given.damage.counts))
    with restored(given.model), differentiable(given.model, ()):
        result = run_with(given.model, at_output, *batch, before=before)
        outputs = given.damage.rule.rows(result, batch)
        for draw in range(draws):
            drawn = given.damage.cotangent(tuple(output.detach() for output in outputs), generator)
            slopes = gradients(outputs, list(made.values()), drawn, keep=draw + 1 < draws)
            for key, slope in zip(made, slopes, strict=True):
                sums.add(calls[key][0], read[key], slope, batch_size(batch))


@dataclass
class _Sums:
    """Both factors of each layer, summed over samples: ``inverses`` are those of the factors before."""

    program: Program
    inverses: Mapping[str, tuple[Tensor, Tensor | None]]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, read: Tensor, slope: Tensor, samples: int) -> None:
        """Add the gradients by a layer's weight, given what a call read and the gradient by what it made."""
        if self.program.kinds[name] == _EMBEDDING:
            rows = slope.reshape(-1, slope.shape[-1])
            self._keep(self.inputs, name, rows.T @ rows)
            return
        rows, slopes = _per_sample(read, samples), _per_sample(slope, samples)
        of_inputs, of_outputs = self.inverses.get(name, (None, None))
        self._keep(self.inputs, name, products_between(rows, slopes, of_outputs))
        self._keep(self.outputs, name, products_between(slopes, rows, of_inputs))

    def _keep(self, sums: dict[str, Tensor], name: str, found: Tensor) -> None:
        own = sums.setdefault(name, torch.zeros(found.shape, dtype=torch.float64, device="cpu"))
        own += found.double().cpu()

    @property
    def moments(self) -> dict[str, Moments]:
        """The factors found."""
        tables = {name: Moments(own[None], table=True) for name, own in self.inputs.items()}
        return tables | {
            name: Moments(self.inputs[name][None], output=own[None]) for name, own in self.outputs.items()
        }


def products_between(rows: Tensor, others: Tensor, middle: Tensor | None) -> Tensor:
    """The sum over samples of G^T M G, where G is others^T rows, both (samples, T, channels), and M the identity where
    there is none; products of T x T are smaller than G where samples are short.
    """
    if rows.shape[1] > max(rows.shape[2], others.shape[2]):
        gradient = others.mT @ rows
        return (gradient.mT @ (gradient if middle is None else middle @ gradient)).sum(0)
    inner = (others if middle is None else others @ middle) @ others.mT
    return rows.flatten(0, 1).T @ (inner @ rows).flatten(0, 1)


def _per_sample(x: Tensor, samples: int) -> Tensor:
    """(samples, rows, channels) of a tensor with its channels last; all as one sample where it does not divide: labels
    are independent, so that cross terms vanish on average.
    """
    rows = x.reshape(-1, x.shape[-1])
    return rows.reshape(samples if len(rows) % samples == 0 else 1, -1, x.shape[-1])
