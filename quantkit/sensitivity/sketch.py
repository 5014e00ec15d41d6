"""Outputs made small enough to keep one copy per format: fewer classes, fewer rows.

Vocabularies: each row keeps the classes most likely in the float model, and all others are thrown by a seeded hash
into buckets whose logit is the log of their summed probability. That is a distribution over fewer outcomes, so damage,
metric and softening apply to it as they are; merging outcomes can only lower a divergence, and by how much is measured
against the full one. Softened far, buckets weigh less than their classes did. Long sequences: a seeded sample of the
rows of each batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.sensitivity.damage import Reference
from quantkit.sensitivity.float_outputs import columns_of
from quantkit.sensitivity.outputs import Outputs

MOST_CLASSES = 2000
TOP, BUCKETS = 192, 64
SHIFT_BYTES = 1 << 29


@dataclass(frozen=True)
class Sketch:
    """Of ``counts`` rows in each batch which are kept, the classes (rows, TOP) each keeps, and the bucket (classes,)
    of all others; the latter two None where all classes are kept.
    """

    counts: list[int]
    rows: list[Tensor]
    top: list[Tensor] | None
    bucket: Tensor | None
    share: float

    def of_kept(self, numbers: Tensor) -> Tensor:
        """Of one number per row of all batches those of the rows that are kept."""
        parts = numbers.split(self.counts)
        return torch.cat([part[kept] for part, kept in zip(parts, self.rows, strict=True)])

    def __call__(self, i: int, output: Tensor) -> Tensor:
        """The output (rows, classes) of batch ``i``, made small."""
        kept = output[self.rows[i].to(output.device)]
        if self.top is None or self.bucket is None:
            return kept
        own = kept.gather(1, self.top[i].to(output.device))
        others = kept.scatter(1, self.top[i].to(output.device), float("-inf"))
        highest = others.max(1, keepdim=True).values
        summed = torch.zeros(len(kept), BUCKETS, dtype=kept.dtype, device=kept.device)
        summed.index_add_(1, self.bucket[: kept.shape[1]].to(output.device), (others - highest).exp())
        return torch.cat([own, summed.clamp(min=torch.finfo(kept.dtype).tiny).log() + highest], dim=1)


@dataclass(frozen=True)
class Sketches:
    """A sketch of each output, None where it is kept as it is."""

    parts: tuple[Sketch | None, ...]

    @classmethod
    def of(cls, reference: Reference, copies: int, generator: torch.Generator) -> Sketches:
        """How to make ``copies`` of the shifts of all outputs fit into ``SHIFT_BYTES``."""
        columns, measures = columns_of(reference.outputs), reference.damage.measures
        merges = [measure.softens for measure in measures]
        sizes = [_bytes(column, copies, merge) for column, merge in zip(columns, merges, strict=True)]
        return cls(
            tuple(
                sketch_for(column, copies, merge, generator, sum(sizes) - size)
                for column, merge, size in zip(columns, merges, sizes, strict=True)
            )
        )

    def __call__(self, i: int, outputs: Outputs) -> Outputs:
        """The outputs of batch ``i``, made small."""
        pairs = zip(self.parts, outputs, strict=True)
        return tuple(rows if sketch is None else sketch(i, rows) for sketch, rows in pairs)

    def of_kept(self, numbers: Sequence[Tensor]) -> list[Tensor]:
        """Of one number per row, by output, those of the rows that are kept."""
        pairs = zip(self.parts, numbers, strict=True)
        return [every if sketch is None else sketch.of_kept(every) for sketch, every in pairs]

    @property
    def share(self) -> float | None:
        """The share of the rows that is kept; None where everything is kept as it is."""
        return min((sketch.share for sketch in self.parts if sketch is not None), default=None)


def _bytes(reference: Sequence[Tensor], copies: int, merge: bool) -> int:
    classes = _classes(reference)
    width = TOP + BUCKETS if merge and classes > MOST_CLASSES else classes
    return 4 * copies * width * sum(map(len, reference))


def _classes(reference: Sequence[Tensor]) -> int:
    """The most classes that a batch has: some outputs have as many as a sequence is long."""
    return max(rows.shape[-1] for rows in reference)


def sketch_for(
    reference: Sequence[Tensor], copies: int, merge: bool, generator: torch.Generator, others: int = 0
) -> Sketch | None:
    """How to make ``copies`` of the output ``reference`` fit into ``SHIFT_BYTES``, beside the bytes of all ``others``;
    None where they do as they are and there are at most ``MOST_CLASSES`` classes. ``merge``: outputs are logits, whose
    classes may be merged.
    """
    classes = _classes(reference)
    share = SHIFT_BYTES / max(1, _bytes(reference, copies, merge) + others)
    merge = merge and classes > MOST_CLASSES
    if share >= 1 and not merge:
        return None
    counts = [len(r) for r in reference]
    rows = [_sample(count, share, generator) for count in counts]
    if not merge:
        return Sketch(counts, rows, None, None, min(share, 1.0))
    top = [_most_likely(r[kept.to(r.device)]) for r, kept in zip(reference, rows, strict=True)]
    bucket = torch.randint(0, BUCKETS, (classes,), generator=generator, device="cpu")
    return Sketch(counts, rows, top, bucket, min(share, 1.0))


def _most_likely(rows: Tensor) -> Tensor:
    return rows.topk(min(TOP, rows.shape[1] - 1), dim=1).indices


def _sample(count: int, share: float, generator: torch.Generator) -> Tensor:
    """Rows to keep, in order: at least two, one for each half that pair terms are compared between."""
    kept = min(count, max(2, int(share * count)))
    return torch.randperm(count, generator=generator, device="cpu")[:kept].sort().values
