"""The decision problem of a profile: one choice per layer, one per site, their agreements, costs in bytes and
bit-operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantkit.allocation.problem import Assignment, Choice, Floats, Option, Problem
from quantkit.errors import InvalidRequest, did_you_mean
from quantkit.formats import Scheme
from quantkit.plan import Layer, Plan, Profile
from quantkit.plan.latency import LatencyTable
from quantkit.plan.operations import execute

FLOAT_BITS = 32
FLOAT = "float"


def layer_bops(layer: Layer, scheme: Scheme) -> int:
    """Weight bits x activation bits x multiply-accumulates; what is float counts 32 bits, float16 weights 16."""
    weight = scheme.weight.bits if scheme.weight else FLOAT_BITS
    return weight * (scheme.activation.bits if scheme.activation else FLOAT_BITS) * layer.macs


# What each limit of a budget counts per layer; constants of the whole model are taken off the limit.
COSTS = {"size": Layer.weight_bytes, "average_bits": Layer.weight_bytes, "bops": layer_bops}


@dataclass(frozen=True)
class AllocationProblem:
    """A problem and what its choices stand for: layers first, then sites."""

    problem: Problem
    layers: tuple[str, ...]
    sites: tuple[str, ...]

    def decode(self, assignment: Assignment) -> tuple[dict[str, Scheme], dict[str, str]]:
        """(layer -> scheme, site -> format) of an assignment."""
        names = [option.name for option in self.problem.chosen(assignment)]
        split = len(self.layers)
        schemes = {layer: Scheme.parse(name) for layer, name in zip(self.layers, names[:split], strict=True)}
        return schemes, dict(zip(self.sites, names[split:], strict=True))


def assignment_of(profile: Profile, allocation: AllocationProblem, plan: Plan) -> Assignment:
    """The assignment that gives this plan; raises InvalidRequest where a choice offers no such option."""
    options = []
    for owner, choice in zip([*allocation.layers, *allocation.sites], allocation.problem.choices, strict=True):
        if choice.name == owner:
            scheme = plan.schemes.get(owner, Scheme())
            read = [plan.sites[site] for site in profile.layers[owner].inputs if site in plan.sites]
            wanted = (str(scheme), read[0] if read else str(scheme.activation or FLOAT))
        else:
            wanted = (plan.sites.get(owner, FLOAT),) * 2
        offered = [(option.name, option.tag) for option in choice.options]
        if wanted not in offered:
            raise InvalidRequest(f"The plan gives {owner!r} {wanted[0]}, which is not among its candidates.")
        options.append(offered.index(wanted))
    return tuple(options)


def candidates(profile: Profile, schemes: Iterable[str | Scheme] | None = None) -> dict[str, tuple[Scheme, ...]]:
    """The schemes each layer without a reason may take: those it was profiled for, restricted to ``schemes`` where
    given.

    Raises InvalidRequest where nothing is left, or a scheme was never profiled.
    """
    wanted = None if schemes is None else [Scheme.parse(s) for s in schemes]
    known = {Scheme.parse(s) for names in profile.candidates.values() for s in names} | {
        Scheme.parse(s) for s in profile.schemes
    }
    for scheme in wanted or ():
        if scheme not in known:
            names = sorted(str(s) for s in known)
            raise InvalidRequest(
                f"{scheme} was not profiled; profiled: {', '.join(names)}.{did_you_mean(str(scheme), names)} "
                "Profile again with it among the schemes."
            )
    allowed = {}
    for name, layer in profile.layers.items():
        if layer.reason:
            continue
        offered = tuple(Scheme.parse(s) for s in profile.candidates.get(name, profile.schemes))
        allowed[name] = offered if wanted is None else tuple(s for s in offered if s in wanted)
        if not allowed[name]:
            raise InvalidRequest(
                f"Layer {name!r} may be {', '.join(map(str, offered))}: none of the schemes asked for."
            )
    return allowed


def allocation_problem(
    profile: Profile,
    limits: Mapping[str, int],
    schemes: Iterable[str | Scheme] | None = None,
    fixed: FixedChoices | None = None,
) -> AllocationProblem:
    """The problem of choosing schemes for all layers and formats for all sites within ``limits`` (of
    ``Budget.limits``).

    What a layer reads and the layer agree on the activation format; layers of a ``same_scheme`` group take one scheme.
    Layers that stay float, and everything stored besides weights, are taken off the limits. ``fixed``: what runs on
    codes has been decided, and only the widths of weights are left to choose."""
    allowed = candidates(profile, schemes) if fixed is None else fixed.candidates(profile, schemes)
    readers = {name: [c for c in site.consumers if c in allowed] for name, site in profile.sites.items()}
    formats = _site_formats(profile, allowed, readers) if fixed is None else fixed.site_formats(profile)
    sites = [name for name in profile.sites if formats[name]]
    index = profile.index()
    tags = {name: _tags(name, options, readers, formats) for name, options in allowed.items()}
    choices = [Choice(name, _layer_options(profile, index, name, tags[name], tuple(limits))) for name in allowed]
    choices += [Choice(f"site {s}", _site_options(profile, index, s, formats[s], len(limits))) for s in sites]
    agree = [tuple(([f"site {s}"] if formats[s] else []) + readers[s]) for s in profile.sites if readers[s]]
    same = [tuple(name for name in names if name in allowed) for names in profile.same_scheme]
    problem = Problem(
        choices=tuple(choices),
        limits=tuple((name, most - fixed_cost(profile, allowed, name, fixed)) for name, most in limits.items()),
        pairs=_pairs(profile, choices, [*allowed, *sites]),
        same=tuple(group for group in same if len(group) > 1),
        agree=tuple(group for group in agree if len(group) > 1),
    )
    return AllocationProblem(problem, tuple(allowed), tuple(sites))


@dataclass(frozen=True)
class FixedChoices:
    """What runs how: the layers that have codes, and the format of every site that holds codes."""

    quantized: frozenset[str]
    sites: Mapping[str, str]

    @classmethod
    def of(cls, plan: Plan) -> FixedChoices:
        """As a plan has it."""
        quantized = frozenset(name for name, scheme in plan.schemes.items() if scheme.has_codes)
        return cls(quantized, {name: fmt for name, fmt in plan.sites.items() if fmt != FLOAT})

    def candidates(self, profile: Profile, schemes: Iterable[str | Scheme] | None) -> dict[str, tuple[Scheme, ...]]:
        """The schemes each layer may take: those in the formats of the sites it reads, or those without codes."""
        allowed = {}
        for name, options in with_float(profile, candidates(profile, schemes), schemes).items():
            read = {self.sites.get(site) for site in profile.layers[name].inputs}
            fitting = tuple(s for s in options if s.has_codes and read <= {str(s.activation)})
            floats = tuple(s for s in options if not s.has_codes)
            allowed[name] = fitting if name in self.quantized else floats or (Scheme(),)
        return allowed

    def site_formats(self, profile: Profile) -> dict[str, list[str]]:
        return {name: [self.sites[name]] if name in self.sites else [] for name in profile.sites}


def with_float(
    profile: Profile, allowed: Mapping[str, tuple[Scheme, ...]], schemes: Iterable[str | Scheme] | None = None
) -> dict[str, tuple[Scheme, ...]]:
    """The candidates with float for every layer that no rule pins, unless only some ``schemes`` are wanted."""
    if schemes is not None:
        return dict(allowed)
    free = {name for name in allowed if tuple(profile.candidates.get(name, profile.schemes)) == profile.schemes}
    return {
        name: (*options, Scheme()) if name in free and not any(s.is_float for s in options) else options
        for name, options in allowed.items()
    }


def layer_ns(table: LatencyTable, layer: str, scheme: Scheme) -> int:
    """Nanoseconds of a layer's own kernel under a scheme."""
    return table.operations[layer].of(scheme.weight.bits if scheme.weight and scheme.has_codes else None)


def _layer_cost(profile: Profile, limit: str, layer: Layer, scheme: Scheme) -> int:
    if limit != "latency":
        return COSTS[limit](layer, scheme)
    assert profile.latency is not None, "the budget checks it"
    return layer_ns(profile.latency, layer.name, scheme)


def fixed_cost(
    profile: Profile, allowed: Mapping[str, tuple[Scheme, ...]], limit: str, fixed: FixedChoices | None = None
) -> int:
    """What counts towards a limit whatever is chosen: layers that stay float, and what is stored besides weights.
    ``fixed``: what runs on codes, for a limit on latency.
    """
    if limit == "latency":
        assert fixed is not None and profile.latency is not None, "decided first"
        own = [profile.latency.operations[name].of(0 if name in fixed.quantized else None) for name in allowed]
        return profile.latency.predict(execute(profile.operations, fixed.quantized)) - sum(own)
    layers = sum(COSTS[limit](layer, Scheme()) for name, layer in profile.layers.items() if name not in allowed)
    return layers + (profile.other_bytes if limit == "size" else 0)


def _site_formats(
    profile: Profile, allowed: Mapping[str, tuple[Scheme, ...]], readers: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """The formats each site may take: those profiled for it, and float where a reader computes with float inputs."""
    formats: dict[str, list[str]] = {name: [] for name in profile.sites}
    for owner, fmt in profile.entries:
        if owner in formats and Scheme.parse(fmt).weight is None:  # a site may be named as a layer is
            formats[owner].append(fmt)
    for name, known in formats.items():
        weight_only = any(s.has_codes and s.activation is None for layer in readers[name] for s in allowed[layer])
        if known and weight_only:
            known.append(FLOAT)
    return formats


def _tags(
    layer: str, options: tuple[Scheme, ...], readers: Mapping[str, list[str]], formats: Mapping[str, list[str]]
) -> list[tuple[Scheme, str]]:
    """(scheme, format of what the layer reads). A layer without codes reads its input in any format."""
    read = [site for site, names in readers.items() if layer in names]
    own = [str(s.activation or FLOAT) for s in options if s.has_codes]
    shared = [str(f) for site in read for f in formats[site]]
    everything = list(dict.fromkeys([*own, *shared])) or [FLOAT]
    tagged = []
    for scheme in options:
        reads = [str(scheme.activation or FLOAT)] if scheme.has_codes else everything
        tagged += [(scheme, tag) for tag in reads]
    return tagged


def _layer_options(
    profile: Profile,
    index: Mapping[tuple[str, str], int],
    name: str,
    tagged: list[tuple[Scheme, str]],
    limits: tuple[str, ...],
) -> tuple[Option, ...]:
    layer, options = profile.layers[name], []
    for scheme, tag in tagged:
        entry = None if scheme.weight is None else profile.entry(index, name, str(scheme.weight))
        damage = 0.0 if entry is None else float(profile.damage[entry])
        costs = tuple(_layer_cost(profile, limit, layer, scheme) for limit in limits)
        options.append(Option(str(scheme), damage, costs, tag))
    return tuple(options)


def _site_options(
    profile: Profile, index: Mapping[tuple[str, str], int], name: str, formats: list[str], limits: int
) -> tuple[Option, ...]:
    damage = [0.0 if fmt == FLOAT else float(profile.damage[index[name, fmt]]) for fmt in formats]
    return tuple(Option(fmt, value, (0,) * limits, fmt) for fmt, value in zip(formats, damage, strict=True))


def _pairs(profile: Profile, choices: list[Choice], owners: list[str]) -> Floats | None:
    """The pair terms of all options; None where the profile has none beside the damages themselves."""
    if not np.any(profile.gram - np.diag(np.diag(profile.gram))):
        return None
    rows = option_entries(profile, choices, owners)
    return with_nothing(profile.gram)[np.ix_(rows, rows)]


def option_entries(profile: Profile, choices: Sequence[Choice], owners: Sequence[str]) -> list[int]:
    """The position in ``profile.entries`` of what every option changes; one past the last for what changes nothing."""
    index, rows = profile.index(), []
    for owner, choice in zip(owners, choices, strict=True):
        for option in choice.options:
            scheme = Scheme.parse(option.name)
            of_layer = owner in profile.layers and not choice.name.startswith("site ")
            fmt = scheme.weight if of_layer else scheme.activation
            rows.append(len(profile.entries) if fmt is None else index[owner, str(fmt)])
    return rows


def with_nothing(gram: Floats) -> Floats:
    """The matrix with a last row and column of zeros, the pair terms of what changes nothing."""
    return np.pad(gram, (0, 1))
