"""From a profile to a plan: the best of all plans, counted by hand, explained, repeatable; what cannot be had is
refused with an amount that can."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantkit.allocation import allocate as allocation
from quantkit.allocation.allocate import allocate
from quantkit.allocation.problem import Problem, Solution
from quantkit.allocation.registry import SOLVERS, SolverGaveUp
from quantkit.errors import InfeasibleBudget, InvalidRequest, QuantkitError
from quantkit.formats import Scheme
from quantkit.plan import Plan, Profile
from tests.allocation.profiles import SCHEMES, network

Schemes = dict[str, Scheme]
BUDGETS = ("3 bits", "4.5 bits", "9 bits", "5 KB", "20%", "bops=3%", "4 bits, bops=2.5%", "size=6 KB, bops=50%")


def every_plan(profile: Profile, offered: tuple[str, ...] | None = None) -> Iterator[tuple[Schemes, dict[str, str]]]:
    """(schemes, sites) of every plan whose groups agree, written down from what a profile means."""
    names = [name for name, layer in profile.layers.items() if not layer.reason]
    for schemes in itertools.product([Scheme.parse(s) for s in offered or profile.schemes], repeat=len(names)):
        plan = dict(zip(names, schemes, strict=True))
        tied = all(len({plan[name] for name in group}) == 1 for group in profile.same_scheme)
        read = {site: {str(plan[c].activation) for c in record.consumers} for site, record in profile.sites.items()}
        if tied and all(len(formats) == 1 for formats in read.values()):
            yield plan, {site: formats.pop().replace("None", "float") for site, formats in read.items()}


def weight_bytes(profile: Profile, schemes: Schemes) -> int:
    return sum(layer.weight_bytes(schemes.get(name, Scheme())) for name, layer in profile.layers.items())


def bops(profile: Profile, schemes: Schemes) -> int:
    total = 0
    for name, layer in profile.layers.items():
        scheme = schemes.get(name, Scheme())
        numbers = [number.bits if number else 32 for number in (scheme.weight, scheme.activation)]
        total += numbers[0] * numbers[1] * layer.macs
    return total


def used(profile: Profile, budget: str, schemes: Schemes) -> list[tuple[float, float]]:
    """(used, allowed) of each limit of a budget, in the words of the design."""
    weights = sum(layer.weights for layer in profile.layers.values())
    size = weight_bytes(profile, schemes)
    float_size = 4 * weights + profile.other_bytes
    float_bops = 1024 * sum(layer.macs for layer in profile.layers.values())
    pairs = []
    for item in budget.split(", "):
        name, _, amount = item.rpartition("=")
        number = float(re.match(r"[\d.]+", amount)[0])  # type: ignore[index]
        if name == "bops":
            pairs.append((bops(profile, schemes), number / 100 * float_bops))
        elif "bits" in amount:
            pairs.append((8 * size / weights, number))
        else:
            allowed = number / 100 * float_size if "%" in amount else number * 1000
            pairs.append((size + profile.other_bytes, allowed))
    return pairs


def fits(profile: Profile, budget: str, schemes: Schemes) -> bool:
    return all(taken <= allowed for taken, allowed in used(profile, budget, schemes))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("pairs", [False, True], ids=["sum", "pairs"])
@pytest.mark.parametrize("seed", range(2))
def test_plan_is_the_best_of_all_plans_within_the_budget(seed: int, pairs: bool, budget: str) -> None:
    profile = network(seed, layers=4, pairs=pairs)
    plans = [(s, sites) for s, sites in every_plan(profile) if fits(profile, budget, s)]
    plan = allocate(profile, budget)
    damages = [profile.predict(schemes, sites) for schemes, sites in plans]
    assert fits(profile, budget, plan.schemes)
    assert plan.predicted_damage == pytest.approx(min(damages), rel=1e-9)
    chosen = {name: scheme for name, scheme in plan.schemes.items() if not profile.layers[name].reason}
    assert (chosen, plan.sites) in plans
    assert plan.provenance["proven"] and plan.provenance["gap"] <= 1e-6
    assert plan.provenance["objective"] == pytest.approx(plan.predicted_damage)
    alone = sum(profile.damage[k] for k in profile.chosen(chosen, plan.sites))
    assert plan.provenance["separable_damage"] == pytest.approx(alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_every_solver_keeps_every_budget(name: str) -> None:
    kept = 0
    for seed, budget in itertools.product(range(3), BUDGETS):
        profile = network(seed, layers=6, pairs=seed % 2 == 1)
        try:
            plan = allocate(profile, budget, solver=name)
        except SolverGaveUp:
            continue
        kept += 1
        assert fits(profile, budget, plan.schemes), budget
        assert plan.schemes["layer4"] == plan.schemes["layer5"]
        assert plan.schemes["layer1"].activation == plan.schemes["layer2"].activation
        assert plan.sites["site1"] == str(plan.schemes["layer1"].activation)
    assert kept >= len(BUDGETS)


def test_sizes_of_a_plan_are_counted_from_its_formats() -> None:
    profile = network(3)
    plan = allocate(profile, "4 bits")
    size = weight_bytes(profile, plan.schemes)
    weights = sum(layer.weights for layer in profile.layers.values())
    assert (plan.size_bytes, plan.total_bytes) == (size, size + 1000)
    assert plan.average_bits == pytest.approx(8 * size / weights)
    assert plan.schemes["head"].is_float
    assert plan.why["head"] == "float: its inputs were never seen"


def test_model_of_which_nothing_can_be_quantized_keeps_its_size_or_is_refused() -> None:
    """Only what stays float counts, and no scheme can change it."""
    profile = network(0, layers=2)
    layers = {name: replace(layer, reason="not supported") for name, layer in profile.layers.items()}
    fixed = replace(profile, layers=layers, sites={}, same_scheme=())
    plan = allocate(fixed, "32 bits")
    assert all(scheme.is_float for scheme in plan.schemes.values())
    assert plan.average_bits == 32
    with pytest.raises(InfeasibleBudget, match=r"No plan has average bits 8 bits: the smallest .* is 32 bits\. Ask"):
        allocate(fixed, "8 bits")


def test_solver_that_lies_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = network(0)

    def lie(problem: Problem, *_: object) -> Solution:
        widest = tuple(len(choice.options) - 1 for choice in problem.choices)
        return Solution(widest, 0.0, 0.0, 0.0, "auto", True)

    monkeypatch.setattr(allocation, "solve", lie)
    with pytest.raises(QuantkitError, match=r"The plan uses [\d,]+ of [\d,]+ under the limit average_bits. Please"):
        allocate(profile, "3 bits")


ASKED = {
    "average bits": "1 bits",
    "bytes": "2000 B",
    "kilobytes": "1.5 KB",
    "kibibytes": "1 KiB",
    "percent": "3%",
    "bit-operations": "bops=1000",
    "bit-operations in millions": "bops=1 M",
    "bit-operations in percent": "bops=0.5%",
}


@pytest.mark.parametrize("layers", [4, 120], ids=["small", "six digits and more"])
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_smallest_amount_in_the_message_can_be_asked_for(asked: str, layers: int) -> None:
    profile = network(7, layers)
    with pytest.raises(InfeasibleBudget) as caught:
        allocate(profile, asked)
    found = re.search(r"the smallest that can be reached is (.+)\. Ask for at least that", str(caught.value))
    assert found is not None, str(caught.value)
    name = f"{asked.partition('=')[0]}=" if "=" in asked else ""
    plan = allocate(profile, name + found[1])
    narrowest = {layer: Scheme.parse("w2a4") for layer in plan.schemes if not profile.layers[layer].reason}
    assert weight_bytes(profile, plan.schemes) == weight_bytes(profile, narrowest)
    amount, unit = re.fullmatch(r"([\d.]+) ?(.*)", found[1]).groups()  # type: ignore[union-attr]
    assert float(amount) == caught.value.smallest
    thousandth_less = f"{name}{round(float(amount) - 0.001, 3)} {unit}"
    with pytest.raises(InfeasibleBudget):
        allocate(profile, thousandth_less)


def test_refusal_under_two_limits_says_which_one_holds() -> None:
    profile = network(2, layers=4)
    with pytest.raises(InfeasibleBudget) as caught:
        allocate(profile, "1 bits, bops=60%")
    message = (
        r"No plan has average bits 1 bits: the smallest that can be reached is [\d.]+ bits\. "
        r"Ask for at least that, or profile narrower schemes\. "
        r"The largest: head \(320 bytes\): its inputs were never seen\."
    )
    assert re.fullmatch(message, str(caught.value)), "the other limit holds whatever is chosen"
    assert caught.value.limit == "average_bits=1 bits"
    assert caught.value.exit_code == 2


def test_limits_that_exclude_each_other_are_told_together() -> None:
    """Narrow weights only with wide activations: each limit can be met, both cannot."""
    profile = network(2, layers=4, schemes=("w2a8", "w3a4"), kept_float=False)
    narrowest, fewest = (allocate(profile, "9 bits", schemes=[s]) for s in profile.schemes)
    share = 100 * bops(profile, fewest.schemes) / (1024 * sum(layer.macs for layer in profile.layers.values()))
    held, bits = f"bops={share + 0.001:.3f}%", f"{narrowest.average_bits + 0.001:.3f} bits"
    for alone in (held, bits):
        assert fits(profile, alone, allocate(profile, alone).schemes)
    with pytest.raises(InfeasibleBudget, match=r"while bops .*% holds: the smallest that can be reached is") as caught:
        allocate(profile, f"{bits}, {held}")
    again = f"{caught.value.smallest} bits, {held}"
    assert fits(profile, again, allocate(profile, again).schemes)


def test_schemes_restrict_the_candidates() -> None:
    profile = network(4, layers=4)
    some = ("w4a8", "w8a8")
    plan = allocate(profile, "6 bits", schemes=some)
    assert {str(s) for name, s in plan.schemes.items() if name != "head"} <= set(some)
    best = min(
        profile.predict(schemes, sites)
        for schemes, sites in every_plan(profile, some)
        if fits(profile, "6 bits", schemes)
    )
    assert plan.predicted_damage == pytest.approx(best)
    assert allocate(profile, "6 bits", schemes=map(Scheme.parse, some)) == plan


def test_scheme_that_was_not_profiled_is_refused_with_the_nearest() -> None:
    known = ", ".join(sorted(SCHEMES))
    with pytest.raises(InvalidRequest, match=rf"w3a8 was not profiled; profiled: {known}\. Did you mean '"):
        allocate(network(0), "4 bits", schemes=["w3a8"])


def test_unknown_solver_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidRequest, match=r"Unknown solver 'hihgs'; known: .*greedy.* Did you mean 'highs'"):
        allocate(network(0), "4 bits", solver="hihgs")


def test_reasons_say_what_a_step_up_or_down_would_change() -> None:
    """The numbers of every sentence, against the plan counted again with that layer changed."""
    profile = network(5, layers=4, pairs=True)
    plan = allocate(profile, "4 bits")
    pattern = r"(\S+) would change the plan's damage by (\S+) and its size by (\S+) bytes"
    checked = 0
    for name, why in plan.why.items():
        if name == "head":
            continue
        group = next((g for g in profile.same_scheme if name in g), (name,))
        assert why.startswith(f"{plan.schemes[name]} adds ")
        for scheme, damage, size in re.findall(pattern, why):
            changed = plan.schemes | dict.fromkeys(group, Scheme.parse(scheme))
            gained = profile.predict(changed, plan.sites) - profile.predict(plan.schemes, plan.sites)
            assert float(damage) == pytest.approx(gained, rel=6e-3)
            assert int(size.replace(",", "")) == weight_bytes(profile, changed) - plan.size_bytes
            checked += 1
    assert set(plan.why) == set(profile.layers)
    assert checked >= 4


def test_narrowest_layer_says_that_nothing_narrower_is_allowed() -> None:
    profile = network(5, layers=4)
    plan = allocate(profile, "2.8 bits", schemes=["w2a8", "w8a8"])
    for name, scheme in plan.schemes.items():
        if name != "head":
            assert f"nothing {'narrower' if str(scheme) == 'w2a8' else 'wider'} is allowed" in plan.why[name]


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [False, True], ids=["sum", "pairs"])
def test_same_request_gives_the_same_plan_file_in_any_process(tmp_path: Path, repo: Path, pairs: bool) -> None:
    path = tmp_path / "profile.safetensors"
    network(6, layers=9 if pairs else 40, pairs=pairs).save(path)
    command = (
        "import sys; from quantkit.allocation.allocate import allocate; from quantkit.plan import Profile\n"
        "allocate(Profile.load(sys.argv[1]), '4 bits, bops=3%').save(sys.argv[2])"
    )
    # Another order of sets and of what hashes decide.
    arguments = [sys.executable, "-c", command, str(path), str(tmp_path / "there")]
    subprocess.run(arguments, check=True, cwd=repo, env={"PYTHONHASHSEED": "1", "PATH": "/usr/bin:/bin"})
    here = [allocate(Profile.load(path), "4 bits, bops=3%") for _ in range(2)]
    assert here[0] == here[1] == Plan.load(tmp_path / "there")
    assert here[0].save(tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
    assert np.isfinite(here[0].provenance["bound"])
