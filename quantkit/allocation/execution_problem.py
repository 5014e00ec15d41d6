"""Which layers run on codes, where that costs something at the boundaries: an integer program with conditions.

Time and activation memory do not add up over layers: a tensor made in float and read as codes is converted, and
whether a site holds codes follows from the layers around it. So every layer's scheme, every site's format, every
integer operation and every conversion is a choice of its own, and conditions tie them together. A condition says that
at most so many of some options are taken: a limit like any other, without a name, whose costs are 0 and 1.

The objective is the sum of the damages alone. Pair terms are left to the second step, which chooses the formats for
the layers and sites decided here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from quantkit.allocation.feasibility import Conflict, OutOfReach
from quantkit.allocation.from_profile import COSTS, FLOAT, FixedChoices, fixed_cost, layer_ns
from quantkit.allocation.highs import highs
from quantkit.allocation.plan_costs import OF_EXECUTION, site_bytes
from quantkit.allocation.presolve import presolve
from quantkit.allocation.problem import Assignment, Choice, Option, Problem
from quantkit.allocation.pulp_cbc import pulp_cbc
from quantkit.allocation.registry import NoAssignment, Settings, SolverGaveUp
from quantkit.errors import InvalidRequest
from quantkit.formats import HALF, Scheme
from quantkit.plan import Profile
from quantkit.plan.latency import LatencyTable, SiteTime
from quantkit.plan.operations import Operation, live_sites

Literal = tuple[str, str]  # a choice and one of its options
CODES = "codes"
CONVERT = "convert"
_NO_CODES = (FLOAT, f"w{HALF}")
_NO_TIME = SiteTime(0, 0, 0, 0)


@dataclass
class _Builder:
    """A problem under construction: options with named costs, and conditions over them."""

    options: dict[str, dict[str, tuple[float, dict[str, int]]]] = field(default_factory=dict)
    conditions: list[tuple[dict[Literal, int], int, str]] = field(default_factory=list)

    def add(self, choice: str, option: str, damage: float = 0.0, **costs: int) -> None:
        self.options.setdefault(choice, {})[option] = (damage, costs)

    def literals(self, choice: str, taken: bool = True) -> list[Literal]:
        """The options of a choice by which it is on codes (or not)."""
        return [(choice, name) for name in self.options[choice] if (name not in _NO_CODES) == taken]

    def at_most(self, most: int, *groups: Iterable[Literal]) -> None:
        """At most so many of these options are taken."""
        costs: dict[Literal, int] = {}
        for group in groups:
            for literal in group:
                costs[literal] = costs.get(literal, 0) + 1
        self.conditions.append((costs, most, ""))

    def follows(self, causes: Sequence[str], effect: str) -> None:
        """``effect`` is on codes exactly when one of ``causes`` is."""
        for cause in causes:
            self.at_most(1, self.literals(cause), self.literals(effect, False))
        missing = [literal for cause in causes for literal in self.literals(cause, False)]
        self.at_most(len(causes), missing, self.literals(effect))

    def problem(self, limits: Mapping[str, int], same: Iterable[tuple[str, ...]] = ()) -> Problem:
        """The costs of named limits come first, then those of the conditions."""

        def option_of(choice: str, name: str) -> Option:
            damage, costs = self.options[choice][name]
            conditions = (row.get((choice, name), 0) for row, _, _ in self.conditions)
            return Option(name, damage, (*(costs.get(limit, 0) for limit in limits), *conditions))

        choices = tuple(Choice(c, tuple(option_of(c, name) for name in names)) for c, names in self.options.items())
        rows = tuple((name, most) for _, most, name in self.conditions)
        return Problem(choices, (*limits.items(), *rows), same=tuple(same))


def choose_execution(
    profile: Profile, limits: Mapping[str, int], allowed: Mapping[str, tuple[Scheme, ...]], settings: Settings
) -> FixedChoices:
    """The layers to quantize and the sites' formats with the least sum of damages within ``limits``. Raises OutOfReach
    with the limit that cannot be met and its smallest.
    """
    problem = execution_problem(profile, limits, allowed)
    try:
        assignment = _solved(problem, settings)
    except NoAssignment:
        raise _out_of_reach(profile, limits, allowed, settings) from None
    taken = {
        choice.name: option.name for choice, option in zip(problem.choices, problem.chosen(assignment), strict=True)
    }
    return FixedChoices(
        frozenset(name for name in allowed if taken[f"layer {name}"] not in _NO_CODES),
        {name: fmt for name in profile.sites if (fmt := taken.get(f"site {name}", FLOAT)) != FLOAT},
    )


def _solved(problem: Problem, settings: Settings) -> Assignment:
    reduced = presolve(problem)
    try:
        result = highs(reduced.problem, settings)
    except SolverGaveUp:
        result = pulp_cbc(reduced.problem, settings)
    return reduced.expand(result.assignment)


def execution_problem(
    profile: Profile, limits: Mapping[str, int], allowed: Mapping[str, tuple[Scheme, ...]]
) -> Problem:
    """The problem of all schemes, site formats, operations and conversions together."""
    builder = _Builder()
    sums = {name: limit for name, limit in limits.items() if name != "activation_bytes"}
    table = profile.latency if "latency" in limits else None
    _add_layers(builder, profile, allowed, sums, table)
    operations = [_own(op, allowed) for op in profile.operations]
    formats = _add_sites(builder, profile, operations, table)
    _add_operations(builder, operations, table)
    _add_conditions(builder, operations, formats, allowed)
    if table is not None:
        _add_conversions(builder, operations, table)
    if "activation_bytes" in limits:
        _add_memory(builder, profile, limits["activation_bytes"])
    kept = {name: limit - _fixed(profile, allowed, name, builder) for name, limit in sums.items()}
    tied = [tuple(f"layer {name}" for name in group if name in allowed) for group in profile.same_scheme]
    return builder.problem(kept, [group for group in tied if len(group) > 1])


def _fixed(profile: Profile, allowed: Mapping[str, tuple[Scheme, ...]], name: str, builder: _Builder) -> int:
    """What counts towards a limit whatever is chosen."""
    if name != "latency":
        return fixed_cost(profile, allowed, name)
    table = profile.latency
    assert table is not None
    chosen = {choice.partition(" ")[2] for choice in builder.options if choice.startswith(("layer ", "integer "))}
    operations = sum(time.float_ns for op, time in table.operations.items() if op not in chosen)
    sites = sum(time.float_ns for site, time in table.sites.items() if f"site {site}" not in builder.options)
    return table.rest_ns + operations + sites


def _own(op: Operation, allowed: Mapping[str, tuple[Scheme, ...]]) -> Operation:
    """An operation as this request sees it: a layer that nothing can give codes is a float operation."""
    fixed = op.kind == "layer" and not any(s.has_codes for s in allowed.get(op.name, ()))
    return replace(op, kind="float") if fixed else op


def _add_layers(
    builder: _Builder,
    profile: Profile,
    allowed: Mapping[str, tuple[Scheme, ...]],
    limits: Mapping[str, int],
    table: LatencyTable | None,
) -> None:
    index = profile.index()
    for name, schemes in allowed.items():
        for scheme in schemes:
            damage = 0.0 if scheme.weight is None else float(profile.damage[index[name, str(scheme.weight)]])
            costs = {limit: COSTS[limit](profile.layers[name], scheme) for limit in limits if limit in COSTS}
            if table is not None:
                costs["latency"] = layer_ns(table, name, scheme)
            builder.add(f"layer {name}", str(scheme), damage, **costs)


def _add_sites(
    builder: _Builder, profile: Profile, operations: Sequence[Operation], table: LatencyTable | None
) -> dict[str, list[str]]:
    """A choice per site that may hold codes, with conversions that are certain then; returns the formats of each."""
    always_float = [op for op in operations if op.kind == "float"]
    read = {site for op in always_float for site in op.reads}
    made = {site for op in operations if op.kind != "float" for site in op.writes}
    formats: dict[str, list[str]] = {}
    for (owner, fmt), damage in zip(profile.entries, profile.damage, strict=True):
        if owner not in profile.sites or not fmt.startswith("a"):
            continue
        time = _NO_TIME if table is None else table.sites[owner]
        if owner not in formats:
            builder.add(f"site {owner}", FLOAT, latency=time.float_ns)
        formats.setdefault(owner, []).append(fmt)
        certain = (0 if owner in made else time.quantize_ns) + (time.dequantize_ns if owner in read else 0)
        builder.add(f"site {owner}", fmt, float(damage), latency=time.codes_ns + certain)
    return formats


def _add_operations(builder: _Builder, operations: Sequence[Operation], table: LatencyTable | None) -> None:
    for op in operations:
        if op.kind == "integer":
            time = None if table is None else table.operations[op.name]
            builder.add(f"integer {op.name}", FLOAT, latency=time.float_ns if time else 0)
            builder.add(f"integer {op.name}", CODES, latency=time.integer_ns if time else 0)


def _choice(op: Operation) -> str:
    return f"{op.kind} {op.name}"


def _add_conditions(
    builder: _Builder,
    operations: Sequence[Operation],
    formats: Mapping[str, Sequence[str]],
    allowed: Mapping[str, tuple[Scheme, ...]],
) -> None:
    """What ``quantkit.plan.operations.execute`` says, as conditions."""
    causes: dict[str, list[str]] = {site: [] for site in formats}

    def touch(op: Operation, sites: Iterable[str]) -> None:
        for site in dict.fromkeys(sites):
            if site in causes:
                causes[site].append(_choice(op))

    for op in operations:
        if op.kind == "layer":
            touch(op, (*op.reads, *(op.writes if op.codes_output else ())))
            for site in causes.keys() & op.reads:
                _agree(builder, op.name, allowed[op.name], site, formats[site])
    for op in operations:
        if op.kind == "integer":
            sources = [cause for site in op.reads for cause in causes.get(site, ())]
            builder.follows(list(dict.fromkeys(sources)), _choice(op))
            touch(op, (*op.reads, *op.writes))
    if unknown := [site for site, choices in causes.items() if not choices]:
        raise InvalidRequest(
            f"Limits on latency or activation memory cannot tell yet what decides whether {unknown[0]} is quantized, "
            "as in products of attention. Use limits on size, bits or bit-operations."
        )
    for site, choices in causes.items():
        builder.follows(list(dict.fromkeys(choices)), f"site {site}")


def _agree(builder: _Builder, layer: str, schemes: Sequence[Scheme], site: str, formats: Sequence[str]) -> None:
    """A quantized layer reads its input in its own activation format."""
    for fmt in dict.fromkeys(str(s.activation) for s in schemes if s.has_codes):
        own = [(f"layer {layer}", str(s)) for s in schemes if s.has_codes and str(s.activation) == fmt]
        others = [(f"site {site}", other) for other in (FLOAT, *formats) if other != fmt]
        builder.at_most(1, own, others)


def _add_conversions(builder: _Builder, operations: Sequence[Operation], table: LatencyTable) -> None:
    """Conversions that depend on what makes and what reads a site."""
    free = [op for op in operations if op.kind != "float"]
    read_by_float = {site for op in operations if op.kind == "float" for site in op.reads}
    for site, time in table.sites.items():
        if f"site {site}" not in builder.options:
            continue
        makers = list(dict.fromkeys(_choice(op) for op in free if site in op.writes))
        readers = [] if site in read_by_float else list(dict.fromkeys(_choice(op) for op in free if site in op.reads))
        codes = builder.literals(f"site {site}")
        for kind, cost, groups in (
            ("quantize", time.quantize_ns, [makers] if makers else []),
            ("dequantize", time.dequantize_ns, [[reader] for reader in readers]),
        ):
            if not groups or not cost:
                continue
            choice = f"{kind} {site}"
            builder.add(choice, FLOAT)
            builder.add(choice, CONVERT, latency=cost)
            for group in groups:
                float_ones = [literal for one in group for literal in builder.literals(one, False)]
                builder.at_most(len(group) + 1, codes, float_ones, [(choice, FLOAT)])


def _add_memory(builder: _Builder, profile: Profile, most: int) -> None:
    """At every step the bytes of the sites that exist then."""
    for live in dict.fromkeys(live_sites(profile.operations, profile.sites)):
        costs: dict[Literal, int] = {}
        certain = 0
        for name in live:
            elements = profile.sites[name].elements
            if f"site {name}" not in builder.options:
                certain += site_bytes(elements, FLOAT)
                continue
            costs |= {(f"site {name}", fmt): site_bytes(elements, fmt) for fmt in builder.options[f"site {name}"]}
        builder.conditions.append((costs, most - certain, "activation_bytes"))


def _out_of_reach(
    profile: Profile, limits: Mapping[str, int], allowed: Mapping[str, tuple[Scheme, ...]], settings: Settings
) -> OutOfReach:
    """The first limit that cannot be met alone, else the first that cannot while all others hold, else with those
    before it.
    """
    names = list(limits)
    attempts: list[tuple[str, tuple[str, ...]]] = [(name, ()) for name in names]
    attempts += [(name, tuple(n for n in names if n != name)) for name in names]
    attempts += [(name, tuple(names[:k])) for k, name in enumerate(names)]
    for name, held in attempts:
        least = smallest(profile, name, {n: limits[n] for n in held}, allowed, settings)
        if least is not None and least > limits[name]:
            text = f"The limit {name} = {limits[name]:,} cannot be met: the smallest is {least:,}."
            return OutOfReach(text, Conflict(name, least, held))
    raise SolverGaveUp("The solver found no assignment, but there is one. Try a looser budget.")


def smallest(
    profile: Profile, name: str, held: Mapping[str, int], allowed: Mapping[str, tuple[Scheme, ...]], settings: Settings
) -> int | None:
    """The least amount of a limit, all that counts included, while others hold; None where those cannot."""
    if name == "activation_bytes":
        return _smallest_peak(profile, held, allowed, settings)
    loose = 2**60
    problem = execution_problem(profile, {name: loose, **held}, allowed)
    choices = tuple(
        one.with_options(lambda _, option: replace(option, damage=float(option.costs[0]))) for one in problem.choices
    )
    try:
        assignment = _solved(replace(problem, choices=choices), settings)
    except NoAssignment:
        return None
    return problem.cost(assignment)[0] + loose - problem.limits[0][1]


def _smallest_peak(
    profile: Profile, held: Mapping[str, int], allowed: Mapping[str, tuple[Scheme, ...]], settings: Settings
) -> int | None:
    """By bisection: what is to be small is the largest of several sums."""

    def fits(most: int) -> bool:
        try:
            _solved(execution_problem(profile, {**held, "activation_bytes": most}, allowed), settings)
        except NoAssignment:
            return False
        return True

    low, high = -1, sum(site_bytes(site.elements, FLOAT) for site in profile.sites.values())
    if not fits(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def needs_execution(limits: Mapping[str, int]) -> bool:
    """Whether a limit depends on which layers run on codes."""
    return any(name in limits for name in OF_EXECUTION)


def separable(limits: Mapping[str, int]) -> dict[str, int]:
    """The limits that are sums over the layers' formats once it is decided what runs on codes."""
    return {name: limit for name, limit in limits.items() if name != "activation_bytes"}
