"""Where integer kernels add a layer's bias: as multiples of input scale x weight scale, in 32 bits.

A bias of a layer that is called on inputs of several scales, or of several layers, has no one grid: each of the calls
has one, and adds the bias as it is rounded there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from quantkit.program.intercept import OpKey, read_place
from quantkit.program.layers import LayerCall, LayerWeight
from quantkit.program.program import Program
from quantkit.program.sites import Site

WITH_BIAS = ("conv1d", "conv2d", "conv3d")  # kinds whose integer kernels take a bias for any input; others for rows


@dataclass(frozen=True)
class BiasCall:
    """A call of a layer whose bias it adds on a grid of its own: that of the site that it reads."""

    key: OpKey
    layer: str
    site: str


def adds_integers(program: Program, weight: LayerWeight, call: LayerCall) -> bool:
    """Whether the integer kernel of a call adds the bias; what multiplies more than rows has it added in float."""
    return weight.bias is not None and (weight.kind in WITH_BIAS or len(program.shape.get(call.input, ())) == 2)


def bias_calls(program: Program, sites: Sequence[Site], layers: Collection[str]) -> tuple[BiasCall, ...]:
    """The calls of ``layers`` that read ``sites`` and whose kernels add a bias that has several grids."""
    at = {place: site.name for site in sites for place in (*site.places, *site.echoes)}
    grids: dict[str, set[tuple[str, str]]] = {}
    found = []
    for name in layers:
        weight = program.weights[name]
        for call in program.calls.get(name, ()) if weight.bias is not None else ():
            site = at.get(read_place(call.key)) or at.get(program.producer[call.input])
            if site is not None:
                grids.setdefault(str(weight.bias), set()).add((name, site))
                if adds_integers(program, weight, call) and _lies_as_read(weight):
                    found.append(BiasCall(call.key, name, site))
    return tuple(call for call in found if len(grids[str(program.weights[call.layer].bias)]) > 1)


def _lies_as_read(weight: LayerWeight) -> bool:
    """Whether kernels read the codes of a weight as they lie, matrices also turned; others are expanded to floats,
    beside a float bias.
    """
    whole = weight.region is None or weight.parameter is None
    return len(weight.shape) == 2 or (whole and weight.order is None)
