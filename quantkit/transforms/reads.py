"""What linear layers read through a ratio for each channel: the tensor is divided by it as it is read, and the weights
that read it are multiplied by it before they get codes (docs/methods/scaled-reads.md).

SmoothQuant (Xiao et al., arXiv 2211.10438) folds the division into the norm before the layers. That needs all readers
of the norm to be layers; here others, as a residual addition, get the tensor as it was made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from quantkit.formats import WeightFormat
from quantkit.program.intercept import READ
from quantkit.program.program import Program
from quantkit.program.sites import Site
from quantkit.targets.roles import LAYER_INPUT
from quantkit.transforms.prepare import Prepared


@dataclass(frozen=True)
class Read:
    """A tensor that linear layers alone read codes of: the sites by which they do (several where each call quantizes
    what it reads for itself), and the layers.
    """

    sites: tuple[str, ...]
    layers: tuple[str, ...]

    @property
    def site(self) -> str:
        """The first of the sites, where the tensor is seen."""
        return self.sites[0]


def scalable_reads(ready: Prepared, weights: Mapping[str, WeightFormat], without: Collection[str]) -> Iterator[Read]:
    """The reads of which each channel can have a ratio, in execution order, but for the sites ``without``."""
    by_value: dict[int, list[Site]] = {}
    for site in ready.sites:
        values = {call.input for name in site.consumers for call in ready.program.calls[name]}
        if site.name not in without and site.roles == (LAYER_INPUT,) and len(values) == 1:
            by_value.setdefault(values.pop(), []).append(site)
    for value, sites in by_value.items():
        read = Read(tuple(s.name for s in sites), tuple(dict.fromkeys(n for s in sites for n in s.consumers)))
        if _is_read_by_channels(ready, read, weights) and all(_is_for_layers(ready, s, read, value) for s in sites):
            yield read


def _is_read_by_channels(ready: Prepared, read: Read, weights: Mapping[str, WeightFormat]) -> bool:
    """Whether all layers multiply the last dimension by a weight with integer codes that nobody else reads."""
    program, every = ready.program, ready.weights.layers
    for name in read.layers:
        weight, format = every[name], weights.get(name)
        if program.kinds[name] != "linear" or weight.parameter is None or format is None or not format.is_integer:
            return False
        own = _calls(program, [other for other in read.layers if every[other].parameter == weight.parameter])
        if any(step.key not in own for step in program.consumers.get(program.stored[weight.parameter], ())):
            return False
        if set(ready.layers[name].inputs) - set(read.sites):
            return False
    return True


def _is_for_layers(ready: Prepared, site: Site, read: Read, value: int) -> bool:
    """Whether the codes of a site are for these layers alone: each call makes them, or all readers are such calls."""
    if all(place.output == READ for place in site.places):
        return True
    program, own = ready.program, _calls(ready.program, read.layers)
    others = [step for step in program.consumers.get(value, ()) if step.key not in own]
    made_there = program.producer.get(value) == site.place
    return made_there and not others and not site.echoes and value not in program.outputs


def _calls(program: Program, layers: Collection[str]) -> set[object]:
    return {call.key for name in layers for call in program.calls[name]}
