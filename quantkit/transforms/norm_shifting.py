"""Shifting of channels behind LayerNorms: what a channel is away from zero moves into the biases of the layers that
read it, so that one range for all channels is as narrow as the widest of them (Outlier Suppression+, Wei et al., arXiv
2304.09145, section 4.1):

    z_j = (max X_j + min X_j) / 2,    norm: b_j - z_j,    layers: b + W z
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import InvalidRequest
from quantkit.numbers.uniform import SiteRange
from quantkit.program.layers import Weights
from quantkit.program.sites import Site
from quantkit.ranges.statistics import visit
from quantkit.transforms.norm_ranges import Norm, Rewrite, rewritable_norms, rewrite
from quantkit.transforms.registry import TRANSFORMS, Proposal, Setting, Transform

SHIFTING = "norm-shifting"
_UNUSED = SiteRange(1.0, 0, 8)  # a rewrite also carries the range of its site, which is not known here


@dataclass(frozen=True, eq=False)
class NormShift:
    """What is subtracted from each channel behind a norm, float64."""

    norm: Norm
    middle: Tensor

    def apply(self, weights: Weights) -> None:
        rewrite(weights, Rewrite(self.norm, torch.ones_like(self.middle), -self.middle, _UNUSED))

    def record(self) -> dict[str, Any]:
        return {"transform": SHIFTING, "at": self.norm.name}


def _propose(setting: Setting) -> Proposal:
    norms, reasons = rewritable_norms(setting.ready)
    static = [n for n in norms if n.site in setting.sites and not setting.sites[n.site].dynamic]
    return Proposal(_shifts(setting, static), reasons)


def _redo(setting: Setting, records: Sequence[Mapping[str, Any]]) -> tuple[NormShift, ...]:
    norms, reasons = rewritable_norms(setting.ready)
    known = {norm.name: norm for norm in norms}
    for record in records:
        if record["at"] not in known:
            why = reasons.get(str(record["at"]), "the model has no such norm")
            raise InvalidRequest(
                f"The plan shifts channels behind the norm {record['at']!r}: {why}. transforms='none' applies the "
                "plan without any."
            )
    return _shifts(setting, [known[record["at"]] for record in records])


def _shifts(setting: Setting, norms: Sequence[Norm]) -> tuple[NormShift, ...]:
    """The shift behind each norm, by the extremes over the batches of a setting."""
    ready = setting.ready
    widths = {norm.site: ready.weights.inputs(norm.layers[0]) for norm in norms}
    extremes: dict[str, tuple[Tensor, Tensor]] = {}

    def widen(site: Site, x: Tensor) -> None:
        low, high = (end.double().cpu() for end in x.reshape(-1, widths[site.name]).aminmax(dim=0))
        if site.name in extremes:
            low, high = torch.minimum(low, extremes[site.name][0]), torch.maximum(high, extremes[site.name][1])
        extremes[site.name] = low, high

    if norms:
        visit(ready.model, [s for s in ready.sites if s.name in widths], widen, setting.batches, ready.padding)
    middles = [(norm, torch.stack(extremes[norm.site]).mean(0)) for norm in norms]
    return tuple(NormShift(norm, middle) for norm, middle in middles)


TRANSFORMS[SHIFTING] = Transform(_propose, _redo)
