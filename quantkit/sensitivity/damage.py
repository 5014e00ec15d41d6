"""How far a model's outputs are from the float model's, row by row, in one number for all outputs that count.

Of each output the mean over its rows counts, and these means are added up: an output of few rows, as one of boxes is,
weighs as much as one of many. Nothing but a number per row is kept of outputs that stream by.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import InvalidRequest
from quantkit.program.inputs import Batch
from quantkit.sensitivity.float_outputs import float_outputs
from quantkit.sensitivity.measure import Subject, random_signs
from quantkit.sensitivity.outputs import OutputRule, Outputs

# At which training samples are compared where a decision follows: a network is too sure of them for damage itself
SOFTENED = 4.0
SLICE_ELEMENTS = 1 << 22  # of outputs that are compared at a time


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, in nats; never below zero.

    The sum of q - p - p log(q / p), which adds q - p, zero in all, to what the definition sums: no term is below zero,
    so that nearly equal rows are told apart far below the rounding of float32, where terms of both signs cancel.
    """
    p, change = log_p.exp(), log_q - log_p
    near = change.abs() < 1
    gain = torch.where(near, p * torch.where(near, change, 0).expm1(), log_q.exp() - p)
    return (gain - p * change).sum(-1).clamp(min=0)


@dataclass(frozen=True)
class KLDamage:
    """KL divergence to the float model's own distribution: no labels, zero gradient at the float point
    (docs/methods/damage.md).
    """

    name = "KL divergence of the output distribution"
    softens = True

    def rows(self, reference: Tensor, output: Tensor) -> Tensor:
        return kl_rows(reference.log_softmax(-1), output.log_softmax(-1))

    def smooth_rows(self, reference: Tensor, output: Tensor, temperature: float = 1.0) -> Tensor:
        """``rows`` to be differentiated: rounding takes a divergence of zero below zero, where ``rows`` is flat.

        Above a temperature of 1 both distributions are softened, and the divergence is multiplied by its square, which
        keeps the size of its gradients (Hinton et al., arXiv 1503.02531, section 2.1).
        """
        log_p = (reference / temperature).log_softmax(-1)
        return temperature**2 * (log_p.exp() * (log_p - (output / temperature).log_softmax(-1))).sum(-1)

    def cotangent(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Random rows c with E[c c^T] = diag(p) - p p^T, the Hessian of the divergence at ``output``: e_y - p, y a
        label drawn from p. Minus the gradient of the cross entropy to y, hence the Fisher information.
        """
        drawn = torch.empty_like(output)
        step = max(1, SLICE_ELEMENTS // max(1, output.shape[-1]))
        for rows, own in zip(output.split(step), drawn.split(step), strict=True):
            p = rows.softmax(-1)
            label = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
            own.copy_(p).neg_().scatter_add_(-1, label, torch.ones_like(p[:, :1]))
        return drawn

    def metric(self, reference: Tensor, shift: Tensor, temperature: float) -> Tensor:
        """Vectors whose inner products are the Gauss-Newton terms of KL: sqrt(p) (u - E_p u), u the shift of the
        logits, p the softmax of ``reference`` / ``temperature``.
        """
        p = (reference / temperature).softmax(-1)
        return p.sqrt() * (shift - (p * shift).sum(-1, keepdim=True))


@dataclass(frozen=True)
class SquaredError:
    """Half the squared shift of the outputs, relative to the mean square ``scale`` of the float model's: for outputs
    that are no logits.
    """

    scale: float
    name = "squared error of the outputs"
    softens = False

    @classmethod
    def relative_to(cls, squares: Tensor) -> SquaredError:
        """The error relative to the mean of these squared lengths of the float model's rows (rows,)."""
        return cls(max(float(squares.detach().mean()), 1e-24))

    def rows(self, reference: Tensor, output: Tensor) -> Tensor:
        return 0.5 * (output - reference).square().sum(-1) / self.scale

    def smooth_rows(self, reference: Tensor, output: Tensor, temperature: float = 1.0) -> Tensor:
        """``rows``, which are smooth and have no temperature."""
        return self.rows(reference, output)

    def cotangent(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Random rows c with E[c c^T] = 1 / scale, the Hessian of the squared error: random signs."""
        return random_signs(output, generator) / self.scale**0.5

    def metric(self, reference: Tensor, shift: Tensor, temperature: float) -> Tensor:
        """The shift over the root of the scale; the metric is flat, ``temperature`` changes nothing."""
        return shift / self.scale**0.5


RowDamage = KLDamage | SquaredError


@dataclass(frozen=True)
class Damage:
    """The sum over all outputs that count of the mean damage of their rows; ``measures`` of each output, and its
    ``counts`` of rows over all batches.
    """

    rule: OutputRule
    measures: tuple[RowDamage, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, rule: OutputRule, reference: Iterable[Outputs]) -> Damage:
        """The damage to the float model's outputs, in one pass over them."""
        squares: list[list[Tensor]] = [[] for _ in rule.outputs]
        counts = [0] * len(rule.outputs)
        for outputs in reference:
            for i, rows in enumerate(outputs):
                counts[i] += len(rows)
                if rule.outputs[i].loss == "mse":
                    squares[i].append(rows.double().square().sum(-1))
        if not all(counts):
            raise InvalidRequest(
                "The calibration data leaves an output without a row: is everything padding, or is a batch empty? "
                "Pass an attention mask that is 1 where there is data."
            )
        measures = [SquaredError.relative_to(torch.cat(parts)) if parts else KLDamage() for parts in squares]
        return cls(rule, tuple(measures), tuple(counts))

    @property
    def name(self) -> str:
        return self.measures[0].name if len(self.measures) == 1 else str(self.rule)

    @property
    def main(self) -> RowDamage:
        """The damage of the output that is the model's answer."""
        return self.measures[self.rule.main]

    @property
    def weights(self) -> list[float]:
        """By what the rows of each output are to be multiplied to weigh as if there were as many as of the first."""
        return [self.counts[0] / count for count in self.counts]

    def rows(self, reference: Outputs, output: Outputs, temperature: float = 1.0) -> tuple[Tensor, ...]:
        """Damage of each row, by output; above a temperature of 1, of softened outputs."""
        self._require_same_shapes(reference, output)
        pairs = zip(self.measures, reference, output, strict=True)
        return tuple(_some_at_a_time(measure, a, b, temperature) for measure, a, b in pairs)

    def mean(self, reference: Outputs, output: Outputs, temperature: float = 1.0) -> Tensor:
        """The damage of these rows alone."""
        return torch.stack([rows.mean() for rows in self.rows(reference, output, temperature)]).sum()

    def share(self, reference: Outputs, output: Outputs) -> Tensor:
        """A batch's share of the damage of all, to be differentiated."""
        parts = zip(self.measures, self.counts, reference, output, strict=True)
        shares = [measure.smooth_rows(a, b).sum() / count for measure, count, a, b in parts]
        return torch.stack(shares).sum()

    def cotangent(self, output: Outputs, generator: torch.Generator) -> list[Tensor]:
        """Random rows for each output whose second moment is the Hessian of its damage times its weight."""
        parts = zip(self.measures, self.weights, output, strict=True)
        return [weight**0.5 * measure.cotangent(rows, generator) for measure, weight, rows in parts]

    def _require_same_shapes(self, reference: Outputs, output: Outputs) -> None:
        for one, a, b in zip(self.rule.outputs, reference, output, strict=True):
            if a.shape != b.shape:
                raise InvalidRequest(
                    f"The output {one.name!r} of the changed model has rows {tuple(b.shape)}, that of the float model "
                    f"{tuple(a.shape)}: they cannot be compared. Quantize the part of the model before values decide "
                    "about shapes, such as the selection of boxes."
                )


def _some_at_a_time(measure: RowDamage, reference: Tensor, output: Tensor, temperature: float) -> Tensor:
    """The damage of each row, of so many rows at a time that what it takes beside the outputs stays small."""
    step = max(1, SLICE_ELEMENTS // max(1, reference.shape[-1]))
    pairs = zip(reference.split(step), output.split(step), strict=True)
    if temperature == 1:
        return torch.cat([measure.rows(a, b) for a, b in pairs])
    return torch.cat([measure.smooth_rows(a, b, temperature) for a, b in pairs])


class RunningDamage:
    """The damage of outputs that stream by, batch after batch: a number per row is kept, so that two runs can be
    compared row by row, on the CPU. What was measured apart can be merged.
    """

    def __init__(self, damage: Damage, parts: Sequence[Tensor] | None = None) -> None:
        self.damage = damage
        self._parts = [[] for _ in damage.measures] if parts is None else [[part] for part in parts]

    def update(self, reference: Outputs, output: Outputs, temperature: float = 1.0) -> None:
        """Add a batch: the rows of the float model's outputs and of the others, padding left out."""
        for kept, rows in zip(self._parts, self.damage.rows(reference, output, temperature), strict=True):
            kept.append(rows.double().cpu())

    def merge(self, other: RunningDamage) -> None:
        """Add what was measured on other batches, which come after these."""
        for kept, more in zip(self._parts, other._parts, strict=True):
            kept += more

    @property
    def rows(self) -> list[Tensor]:
        """The damage of every row, float64, by output."""
        return [torch.cat(parts) for parts in self._parts]

    def since(self, before: RunningDamage) -> RunningDamage:
        """How much more it is, row by row, than ``before`` on the same batches."""
        return RunningDamage(self.damage, [own - other for own, other in zip(self.rows, before.rows, strict=True)])

    @property
    def mean(self) -> float:
        return sum(float(rows.mean()) for rows in self.rows)

    @property
    def mean_and_error(self) -> tuple[float, float]:
        """The damage and its standard error; of several outputs, whose rows depend on each other in ways unknown, the
        most it can be.
        """
        means, errors = zip(*map(mean_and_error, self.rows), strict=True)
        return sum(means), sum(errors)


def average(runs: Sequence[RunningDamage]) -> RunningDamage:
    """The mean of several runs of the same batches, row by row."""
    rows = zip(*(run.rows for run in runs), strict=True)
    return RunningDamage(runs[0].damage, [torch.stack(one).mean(0) for one in rows])


@dataclass(frozen=True)
class Reference:
    """What damage is measured against: the float model's outputs for all batches, held or made again."""

    batches: Sequence[Batch]
    outputs: Sequence[Outputs]
    damage: Damage

    @classmethod
    def of(cls, subject: Subject) -> Reference:
        """Run the float model of a subject, which knows its rule then."""
        outputs = float_outputs(subject)
        return cls(subject.batches, outputs, Damage.of(subject.rule or OutputRule(), outputs))

    def damage_of(self, outputs: Iterable[Outputs]) -> RunningDamage:
        """The damage of another run of the same batches."""
        running = RunningDamage(self.damage)
        for reference, output in zip(self.outputs, outputs, strict=True):
            running.update(reference, output)
        return running

    def samples(self) -> list[Tensor]:
        """The sample number of every row, by output."""
        return self.damage.rule.samples(self.batches, self.counts)

    @cached_property
    def counts(self) -> list[list[int]]:
        """The rows of every output, by batch."""
        return [[len(rows) for rows in outputs] for outputs in self.outputs]


def notes_on(subject: Subject, damage: Damage, here: RunningDamage) -> dict[str, Any]:
    """What was measured, and around a base plan the base's own damage, given that ``here``."""
    return {"damage": damage.name} | ({"base_damage": here.mean} if subject.base else {})


def mean_and_error(rows: Tensor) -> tuple[float, float]:
    """Mean of independent numbers and its standard error."""
    return float(rows.mean()), float(rows.std(correction=min(1, len(rows) - 1))) / len(rows) ** 0.5
