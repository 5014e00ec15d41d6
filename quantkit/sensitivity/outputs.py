"""Which tensors of a model's result count, how each is compared, and which of their rows are padding.

Every floating-point tensor counts, but for what records carry along: losses, caches, and all layers' hidden states;
where there are logits, also the hidden state that they were made from. A single output is compared by the divergence
where its rows have at least two classes. Of several outputs only those named logits are distributions as far as
anybody can tell: boxes have four "classes" too, and class scores may go through sigmoids. So all others are compared
by their squared error relative to their own mean square, which makes one of scores and one of boxes as large as each
other whatever their units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import InvalidRequest
from quantkit.program.inputs import Batch, batch_size
from quantkit.program.outputs import counted, is_logits, named_tensors, position_of_answer
from quantkit.program.padding import Argument, live_positions, mask_arguments, mask_of

Outputs = tuple[Tensor, ...]  # of every output that counts (rows, classes), in the order of the rule
LOSSES = ("kl", "mse")
SQUARED = "relative squared error"
MASKED = -1e4  # a logit of probability zero, also where outputs are softened


def rows_of(output: Tensor) -> Tensor:
    """(rows, classes): classes are dimension 1 of image-like outputs (N, C, H, W), the last dimension otherwise. A
    class that is masked by minus infinity becomes finite, and stays impossible: infinities have no differences.
    """
    if output.dim() >= 4:
        output = output.movedim(1, -1)
    return _as_rows(output if output.dim() > 1 else output.reshape(-1, 1))


def _as_rows(output: Tensor) -> Tensor:
    rows = output.reshape(-1, output.shape[-1])
    return rows.float().masked_fill(rows == -math.inf, MASKED)


@dataclass(frozen=True)
class Output:
    """One output that counts: what it is called, the loss it is compared by, its classes, and whether it has a
    position for every entry of the attention mask: (samples, positions, ..., classes).
    """

    name: str
    loss: str
    classes: int
    padded: bool = False

    def rows(self, tensor: Tensor, live: Tensor | None = None) -> Tensor:
        """(rows, classes) of the positions that are ``live`` (samples, positions), by default all."""
        if not self.padded:
            return rows_of(tensor)
        return _as_rows(tensor if live is None else tensor[live.to(tensor.device)])

    def samples(self, rows: int, batch: Batch, live: Tensor | None) -> Tensor:
        """For each of the rows that a batch gives, the number of its sample in the batch. Without a mask all samples
        have as many, as near as it can be told.
        """
        count = batch_size(batch)
        if not self.padded or live is None:
            return torch.arange(rows, device="cpu") * count // max(1, rows)
        lengths = live.sum(1).cpu()
        return torch.arange(len(lengths), device="cpu").repeat_interleave(
            lengths * (rows // max(1, int(lengths.sum())))
        )

    def __str__(self) -> str:
        return f"KL of {self.name} ({self.classes} classes)" if self.loss == "kl" else f"{SQUARED} of {self.name}"


@dataclass(frozen=True)
class OutputRule:
    """The outputs of a model that count, found from one run. ``main``: the position of the one among them that is the
    model's answer. ``mask``: the argument (name, position among the positional ones or None) that tells padding.
    """

    outputs: tuple[Output, ...] = ()
    main: int = 0
    mask: Argument | None = None

    @classmethod
    def of(cls, model: nn.Module, result: Any, batch: Batch, loss: str) -> OutputRule:
        """The rule for a model that made ``result`` of ``batch``; ``loss``: "auto", or "kl" or "mse" for all outputs
        (of several, one of a single class has no distribution: always "mse").
        """
        if loss not in ("auto", *LOSSES):
            raise InvalidRequest(f"Unknown loss {loss!r}; known: auto, {', '.join(LOSSES)}.")
        tensors = counted(result)
        mask = mask_arguments(model)[0]
        live = _live(batch, mask)
        outputs = []
        for name, tensor in tensors:
            padded = live is not None and tensor.dim() > 2 and tensor.shape[:2] == live.shape
            classes = tensor.shape[-1] if padded else rows_of(tensor).shape[-1]
            outputs.append(Output(name, _loss(loss, name, classes, len(tensors) == 1), classes, padded))
        used = mask if any(output.padded for output in outputs) else None
        return cls(tuple(outputs), position_of_answer([name for name, _ in tensors]), used)

    @property
    def answer(self) -> Output:
        """The output that learning after rounding compares."""
        return self.outputs[self.main]

    def tensors(self, result: Any) -> list[Tensor]:
        """The outputs that count of another result of the same model; raises InvalidRequest where one is missing."""
        found = dict(named_tensors(result))
        missing = [output.name for output in self.outputs if output.name not in found]
        if missing:
            raise InvalidRequest(
                f"The model returns {', '.join(found) or 'no tensors'} for a calibration batch, but for the first one "
                f"it also returned {', '.join(missing)}. Pass batches for which it returns the same."
            )
        return [found[output.name] for output in self.outputs]

    def rows(self, result: Any, batch: Batch) -> Outputs:
        """What is compared of the result for a batch: rows under padding are left out."""
        return self.rows_of(self.tensors(result), batch)

    def rows_of(self, tensors: Sequence[Tensor], batch: Batch) -> Outputs:
        """``rows``, given the outputs that count."""
        live = self.live(batch)
        pairs = zip(self.outputs, tensors, strict=True)
        return tuple(output.rows(tensor, live) for output, tensor in pairs)

    def live(self, batch: Batch) -> Tensor | None:
        """The positions (samples, positions) of a batch that are no padding; None where nothing says so."""
        return _live(batch, self.mask)

    def samples(self, batches: Sequence[Batch], counts: Sequence[Sequence[int]]) -> list[Tensor]:
        """For each output the sample number of each of its rows over all batches, given how many rows of each output
        every batch has. A single sample counts as two, its first rows and its last.
        """
        if sum(map(batch_size, batches)) == 1:
            totals = [sum(column) for column in zip(*counts, strict=True)]
            return [torch.arange(total, device="cpu") * 2 // max(1, total) for total in totals]
        numbers: list[list[Tensor]] = [[] for _ in self.outputs]
        start = 0
        for batch, rows in zip(batches, counts, strict=True):
            live = self.live(batch)
            for found, output, count in zip(numbers, self.outputs, rows, strict=True):
                found.append(start + output.samples(count, batch, live))
            start += batch_size(batch)
        return [torch.cat(found) for found in numbers]

    def record(self) -> dict[str, Any]:
        """The rule as plain data, for provenance."""
        return asdict(self)

    def __str__(self) -> str:
        text = " + ".join(map(str, self.outputs))
        return text if self.mask is None else f"{text}, without what {self.mask[0]} calls padding"


def joined(batches: Sequence[Outputs]) -> Outputs:
    """The rows of all batches together, by output, on the CPU. Where rows of some batches are longer, as those of
    attention weights are, the others are filled up with logits of probability zero, which nothing shifts.
    """
    return tuple(_as_wide(column) for column in zip(*batches, strict=True))


def _as_wide(parts: Sequence[Tensor]) -> Tensor:
    classes = max(rows.shape[-1] for rows in parts)
    same = [nn.functional.pad(rows, (0, classes - rows.shape[-1]), value=MASKED) for rows in parts]
    return torch.cat(same).cpu()


def _loss(asked: str, name: str, classes: int, alone: bool) -> str:
    if alone:
        return asked if asked != "auto" else "kl" if classes >= 2 else "mse"
    distribution = asked == "kl" or (asked == "auto" and is_logits(name))
    return "kl" if distribution and classes >= 2 else "mse"


def _live(batch: Batch, mask: Argument | None) -> Tensor | None:
    """The positions (samples, positions) of a batch that are no padding; None where it has no mask."""
    given = None if mask is None else mask_of(batch, mask)
    return None if mask is None or given is None else live_positions(given, mask)
