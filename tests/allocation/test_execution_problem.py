"""Limits that depend on which layers run on codes: against every plan of small networks, counted one by one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest

from quantkit.allocation.allocate import allocate
from quantkit.allocation.pareto import pareto
from quantkit.errors import InfeasibleBudget, InvalidRequest
from quantkit.formats import Scheme
from quantkit.plan import Layer, Plan, Profile, SiteRecord
from quantkit.plan.latency import LatencyTable, OperationTime, SiteTime
from quantkit.plan.operations import Operation

OPERATIONS = (
    Operation("stem", "layer", ("input",), ("a",), codes_output=True),
    Operation("one", "layer", ("a",), ("b",), codes_output=True),
    Operation("two", "layer", ("b",), ("c",), codes_output=True),
    Operation("plus", "integer", ("c", "a"), ("d",)),
    Operation("swish", "float", ("d",), ("e",)),
    Operation("three", "layer", ("e",), ("f",), codes_output=True),
    Operation("plus.1", "integer", ("f", "d"), ("g",)),
    Operation("mean", "float", ("g",), ("m",)),
    Operation("head", "layer", ("m",)),
)
ELEMENTS = {"input": 48, "a": 256, "b": 300, "c": 256, "d": 256, "e": 256, "f": 256, "g": 256, "m": 16}
LAYERS = ("stem", "one", "two", "three", "head")
SCHEMES = ("w3a8", "w8a8")


def network(seed: int, **changes: object) -> Profile:
    """Two residual additions with an operation between them that has no integer kernel; times at random, some layers
    slower on codes.
    """
    draw = np.random.default_rng(seed)
    reads = {op.name: op.reads for op in OPERATIONS if op.kind == "layer"}
    layers = {n: Layer(n, "conv2d", (4, 4, 3, 3), 576, 144 * 64, inputs=reads[n]) for n in LAYERS}
    entries = tuple((n, fmt) for n in LAYERS for fmt in ("w3", "w8")) + tuple((s, "a8") for s in ELEMENTS)
    damage = np.array([draw.uniform(0.5, 2) * {"w3": 1.0, "w8": 0.01, "a8": 0.02}[fmt] for _, fmt in entries])

    def times(count: int) -> list[int]:
        return [int(t) for t in draw.integers(0, 100, count)]

    table = LatencyTable(
        model="hand-written",
        threads=1,
        batch=1,
        rest_ns=50,
        operations={op.name: OperationTime(*(100 + t for t in times(3))) for op in OPERATIONS if op.kind != "float"},
        sites={site: SiteTime(*times(4)) for site in ELEMENTS},
    )
    made = Profile(
        layers=layers,
        sites={s: SiteRecord(s, n, tuple(k for k in LAYERS if s in reads[k])) for s, n in ELEMENTS.items()},
        schemes=SCHEMES,
        entries=entries,
        damage=damage,
        gram=np.diag(2 * damage),
        other_bytes=100,
        float_bytes=100 + 576 * len(LAYERS),
        target="onnxruntime-cpu",
        operations=OPERATIONS,
        latency=table,
    )
    return replace(made, **changes)


def coded_by_hand(quantized: set[str]) -> tuple[set[str], dict[str, bool]]:
    """The sites that hold codes and the additions that run on them, spelled out for this one network."""
    coded = set()
    for layer, sites in {"stem": "input a", "one": "a b", "two": "b c", "three": "e f", "head": "m"}.items():
        if layer in quantized:
            coded.update(sites.split())
    first = bool(coded & {"c", "a"})
    if first:
        coded |= {"c", "a", "d"}
    second = bool(coded & {"f", "d"})
    if second:
        coded |= {"f", "d", "g"}
    return coded, {"plus": first, "plus.1": second}


def nanoseconds(profile: Profile, schemes: Mapping[str, object]) -> int:
    """The time of a plan, added up by hand."""
    quantized = {name for name, scheme in schemes.items() if str(scheme) != "float"}
    table, (coded, additions) = profile.latency, coded_by_hand(quantized)
    on_codes = {**{n: n in quantized for n in LAYERS}, **additions, "swish": False, "mean": False}
    total = table.rest_ns
    for name, time in table.operations.items():
        if not on_codes[name]:
            total += time.float_ns
        else:
            total += time.wide_ns if str(schemes.get(name)) == "w8a8" else time.integer_ns
    for site, time in table.sites.items():
        if site not in coded:
            total += time.float_ns
            continue
        makers = [op.name for op in OPERATIONS if site in op.writes]
        readers = [op.name for op in OPERATIONS if site in op.reads]
        total += time.codes_ns
        total += 0 if any(on_codes[m] for m in makers) else time.quantize_ns
        total += time.dequantize_ns if any(not on_codes[r] for r in readers) else 0
    return total


def peak(quantized: set[str]) -> int:
    """The most bytes at once, by hand: what is alive at each of the nine steps."""
    alive = ["input a", "a b", "a b c", "a c d", "d e", "d e f", "d f g", "g m", "m"]
    coded, _ = coded_by_hand(quantized)
    return max(sum(ELEMENTS[s] * (1 if s in coded else 4) for s in step.split()) for step in alive)


def every_plan(profile: Profile, floats: bool = True) -> Iterator[tuple[float, dict[str, int]]]:
    """(predicted damage, amounts) of every plan."""
    index = {entry: k for k, entry in enumerate(profile.entries)}
    for names in itertools.product(("float", *SCHEMES) if floats else SCHEMES, repeat=len(LAYERS)):
        schemes = dict(zip(LAYERS, names, strict=True))
        quantized = {n for n, s in schemes.items() if s != "float"}
        coded, _ = coded_by_hand(quantized)
        damage = sum(profile.damage[index[n, schemes[n][:2]]] for n in quantized)
        damage += sum(profile.damage[index[site, "a8"]] for site in coded)
        sizes = {"float": 576, "w3a8": 54 + 16, "w8a8": 144 + 16}  # 144 codes and 4 scales
        yield (
            float(damage),
            {
                "latency": nanoseconds(profile, schemes),
                "size": 100 + sum(sizes[s] for s in names),
                "activation_bytes": peak(quantized),
            },
        )


UNITS = {"latency": "ns", "size": "B", "activation_bytes": "B"}


def asked(amounts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={amount} {UNITS[name]}" for name, amount in amounts.items())


def amounts_of(profile: Profile, plan: Plan) -> dict[str, int]:
    quantized = {n for n, s in plan.schemes.items() if not s.is_float}
    return {
        "latency": nanoseconds(profile, plan.schemes),
        "size": plan.total_bytes,
        "activation_bytes": peak(quantized),
    }


@pytest.mark.parametrize("names", ["latency", "latency size", "activation_bytes", "latency activation_bytes size"])
@pytest.mark.parametrize("seed", range(4))
def test_the_plan_is_the_best_of_all_plans_within_the_limits(seed: int, names: str) -> None:
    profile = network(seed)
    plans = list(every_plan(profile))
    draw = np.random.default_rng(seed)
    for _ in range(2):
        _, amounts = plans[int(draw.integers(len(plans)))]  # so that one plan fits
        limits = {name: amounts[name] for name in names.split()}
        plan = allocate(profile, asked(limits))
        found = amounts_of(profile, plan)
        assert all(found[name] <= limit for name, limit in limits.items())
        inside = [d for d, used in plans if all(used[name] <= limit for name, limit in limits.items())]
        assert plan.predicted_damage == pytest.approx(min(inside), abs=1e-9)
        if "latency" in limits:
            assert plan.provenance["latency_ns"] == found["latency"]
        assert set(plan.sites) == coded_by_hand({n for n, s in plan.schemes.items() if not s.is_float})[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["latency", "activation_bytes"])
def test_a_limit_that_cannot_be_met_is_refused_with_the_smallest(seed: int, name: str) -> None:
    profile = network(seed)
    least = min(used[name] for _, used in every_plan(profile))
    with pytest.raises(InfeasibleBudget) as caught:
        allocate(profile, asked({name: least - 1}))
    assert caught.value.smallest == least
    assert f"the smallest that can be reached is {least} {UNITS[name]}" in str(caught.value)
    assert amounts_of(profile, allocate(profile, asked({name: least})))[name] == least


def test_limits_that_exclude_each_other_name_the_one_that_holds() -> None:
    profile = network(1)
    plans = [used for _, used in every_plan(profile)]
    size, latency = (min(used[name] for used in plans) for name in ("size", "latency"))
    least = min(used["size"] for used in plans if used["latency"] <= latency)
    assert least > size, "each can be met alone"
    with pytest.raises(
        InfeasibleBudget, match=rf"No plan has size {size} B while latency {latency} ns holds"
    ) as caught:
        allocate(profile, asked({"latency": latency, "size": size}))
    assert caught.value.smallest == least
    allocate(profile, asked({"latency": latency, "size": least}))


def test_percent_of_the_float_model() -> None:
    profile = network(2)
    assert nanoseconds(profile, {}) == profile.latency.float_ns
    plan = allocate(profile, "latency=100%")
    assert all(scheme.is_float for scheme in plan.schemes.values())
    least = min(used["latency"] for _, used in every_plan(profile))
    with pytest.raises(InfeasibleBudget) as caught:
        allocate(profile, "latency=1%")
    assert caught.value.smallest == pytest.approx(100 * least / profile.latency.float_ns, abs=1e-3)
    allocate(profile, f"latency={caught.value.smallest}%")


def test_a_rule_and_named_schemes_leave_float_out() -> None:
    pinned = network(0, candidates={"stem": ("w8a8",)})
    assert str(allocate(pinned, "latency=1 s").schemes["stem"]) == "w8a8"
    assert allocate(pinned, "latency=1 s").schemes["one"].is_float
    plan = allocate(network(0), "latency=1 s", schemes=SCHEMES)
    assert {str(scheme) for scheme in plan.schemes.values()} == {"w8a8"}


def test_narrow_activations_have_no_times() -> None:
    profile = network(0, candidates={"stem": ("w3a4", "w3a8"), "two": ("w3a4",)})
    with pytest.raises(InvalidRequest, match=r"with 8-bit activations so far, and layer 'two' may be w3a4\. Add"):
        allocate(profile, "latency=1 s")


def test_layers_of_one_group_take_one_scheme() -> None:
    profile = network(3, same_scheme=(("one", "three"),))
    best = allocate(network(3), "latency=1 s, size=1500 B")
    tied = allocate(profile, "latency=1 s, size=1500 B")
    assert tied.schemes["one"] == tied.schemes["three"]
    assert tied.predicted_damage >= best.predicted_damage


def test_a_layer_with_a_reason_stays_float_and_its_time_counts() -> None:
    base = network(4)
    layers = base.layers | {"two": replace(base.layers["two"], reason="reads a constant")}
    profile = replace(base, layers=layers)
    others = [n for n in LAYERS if n != "two"]
    combinations = itertools.product(("float", *SCHEMES), repeat=len(others))
    limit = min(nanoseconds(profile, dict(zip(others, names, strict=True))) for names in combinations)
    plan = allocate(profile, asked({"latency": limit}))
    assert plan.schemes["two"].is_float
    assert nanoseconds(profile, plan.schemes) == limit


def test_pair_terms_decide_the_widths_within_the_chosen_execution() -> None:
    profile = network(5)
    shifts = np.random.default_rng(0).normal(size=(len(profile.entries), 40))
    shifts *= np.sqrt(2 * profile.damage / np.square(shifts).sum(axis=1))[:, None]
    profile = replace(profile, gram=shifts @ shifts.T)
    limits = {"latency": nanoseconds(profile, dict.fromkeys(["stem", "one", "two"], "w3a8")), "size": 1900}
    plan = allocate(profile, asked(limits))
    found = amounts_of(profile, plan)
    assert all(found[name] <= limit for name, limit in limits.items())
    quantized = [n for n, s in plan.schemes.items() if not s.is_float]
    for names in itertools.product(SCHEMES, repeat=len(quantized)):
        other = plan.schemes | {n: Scheme.parse(s) for n, s in zip(quantized, names, strict=True)}
        size = sum(layer.weight_bytes(other[n]) for n, layer in profile.layers.items()) + 100
        if size <= limits["size"] and nanoseconds(profile, other) <= limits["latency"]:
            assert profile.predict(other, plan.sites) >= plan.predicted_damage - 1e-9


def test_reasons_say_what_the_other_way_to_run_would_change() -> None:
    profile = network(6)
    plan = allocate(profile, asked({"latency": nanoseconds(profile, dict.fromkeys(["one", "two"], "w3a8"))}))
    for name, why in plan.why.items():
        change = re.search(r"in (float|integer kernels) it would change the latency by (\S+) microseconds", why)
        other = "w3a8" if plan.schemes[name].is_float else "float"
        expected = nanoseconds(profile, {**plan.schemes, name: other}) - nanoseconds(profile, plan.schemes)
        assert change is not None
        assert float(change[2]) == pytest.approx(expected / 1e3, abs=0.051)
        assert (change[1] == "float") == (not plan.schemes[name].is_float)


def test_front_along_latency_falls_in_damage_as_time_is_given() -> None:
    profile = network(3)
    front = pareto(profile, limit="latency")
    times = [plan.provenance["latency_ns"] for plan in front]
    assert times == sorted(times)
    assert times[0] == min(used["latency"] for _, used in every_plan(profile))
    damages = [plan.predicted_damage for plan in front]
    assert damages == sorted(damages, reverse=True)
    assert len(front) > 2


def test_without_a_table_a_limit_on_latency_says_how_to_get_one() -> None:
    with pytest.raises(InvalidRequest, match=r"latency=60% needs times measured .* run `quantkit bench RECIPE`"):
        allocate(network(0, latency=None), "latency=60%")
    with pytest.raises(InvalidRequest, match="needs times measured"):
        pareto(network(0, latency=None), limit="latency")
