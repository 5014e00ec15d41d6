"""Do the solvers agree with brute force, how fast are they, and how close to the optimum?

    python tools/bench_solvers.py [--problems 3000] [--feasibility 10000] [--large] [--quadratic] [--tabu-seconds 600]
    python tools/bench_solvers.py --problems 0 --feasibility 0 --compare [PROFILE ...]

* ``--problems``: random problems with groups and 1 to 4 limits, small enough to look at every combination: PuLP, HiGHS
  and the dynamic program must find the least sum of damages, ``auto`` the least objective with pair terms,
  and what has no answer must be refused with the least that can be reached.
* ``--feasibility``: plans of every solver on larger problems, counted again here: how many are over a limit?
* ``--large``: 500 layers x 8 formats x 3 limits, processor time and gap.
* ``--quadratic``: 12 x 4 with pair terms against brute force, and 40 x 5 against a long tabu search.
* ``--compare``: every solver on the stored programs of HAWQ-V3, on the problems of stored profiles at several budgets
  and on generated ones: how far above the best that any solver finds, and processor time.

On a machine that does other work too, set OPENBLAS_NUM_THREADS=1: threads on small matrices wait for each other.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from quantkit.allocation.allocate import gap_for
from quantkit.allocation.feasibility import OutOfReach
from quantkit.allocation.from_profile import allocation_problem
from quantkit.allocation.problem import Problem, Solution
from quantkit.allocation.registry import PAIR_SOLVERS, SOLVERS, Settings, SolverGaveUp
from quantkit.allocation.solve import solve
from quantkit.budget import Budget
from quantkit.errors import QuantkitError
from quantkit.plan import Profile

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the twin stands beside the tests that need it
from tests.allocation.helpers import Listed, everything, optimum, random_problem
from tests.allocation.test_hawqv3 import problem_of

PRECISION = 1e-9
EXACT = ("pulp", "highs", "dp")


def problems(seed: int, count: int, **kinds: object) -> Iterator[Problem]:
    for k in range(count):
        yield random_problem(np.random.default_rng([seed, k]), **kinds)  # type: ignore[arg-type]


def within_reach(seed: int, count: int, **kinds: object) -> Iterator[Problem]:
    """Random problems that have a solution."""
    left = count
    for problem in problems(seed, 1000 * count, **kinds):
        try:
            solve(replace(problem, pairs=None), "highs")
        except OutOfReach:
            continue
        yield problem
        left -= 1
        if not left:
            return


def counted(problem: Problem, solution: Solution) -> bool:
    """Whether a solution meets every limit, added up here."""
    taken = [choice.options[k] for choice, k in zip(problem.choices, solution.assignment, strict=True)]
    return all(sum(option.costs[k] for option in taken) <= limit for k, (_, limit) in enumerate(problem.limits))


def disagreement(problem: Problem, listed: Listed, name: str) -> str:
    """What a solver does that brute force does not confirm; empty when all is right."""
    inside = listed.within([limit for _, limit in problem.limits])
    values = listed.objectives if name in PAIR_SOLVERS else listed.sums
    try:
        solution = solve(problem if name in PAIR_SOLVERS else replace(problem, pairs=None), name)
    except OutOfReach as refused:
        return _blamed_wrongly(problem, listed, refused) or ("refused, but there is a plan" if inside.any() else "")
    except SolverGaveUp as refused:
        return f"gave up: {refused}"
    if not inside.any():
        return "found a plan where there is none"
    best = float(values[inside].min())
    rounding = PRECISION * max(option.damage for choice in problem.choices for option in choice.options)
    if not counted(problem, solution):
        return "is over a limit"
    if abs(solution.objective - best) > rounding or solution.bound > best + rounding:
        return f"objective {solution.objective}, bound {solution.bound}, brute force {best}"
    return ""


def _blamed_wrongly(problem: Problem, listed: Listed, refused: OutOfReach) -> str:
    names = [name for name, _ in problem.limits]
    held = [limit if name in refused.conflict.held else 2**62 for name, limit in problem.limits]
    least = int(listed.costs[listed.within(held), names.index(refused.limit)].min())
    return "" if least == refused.smallest else f"says {refused.smallest} is the smallest, brute force says {least}"


def agreement(count: int, seed: int) -> int:
    """Print how often every solver and brute force disagree; the number of disagreements."""
    runs: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    infeasible = 0
    for k, problem in enumerate(problems(seed, count, limits=(1, 4), pairs=True)):
        listed = everything(problem)
        infeasible += not listed.within([limit for _, limit in problem.limits]).any()
        for name in (*EXACT, "auto"):
            if name == "dp" and len(problem.limits) > 1:
                continue
            runs[name] += 1
            if message := disagreement(problem, listed, name):
                wrong[name] += 1
                print(f"  problem {k}: {name} {message}")
    print(f"agreement with brute force on {count:,} random problems, 1 to 4 limits ({infeasible:,} without a plan):")
    for name, number in runs.items():
        print(f"  {name:<10} {number - wrong[name]:,} of {number:,}")
    return wrong.total()


def feasibility(count: int, seed: int) -> int:
    """Print how many plans of all solvers break a limit; their number."""
    plans, over, refused, left = 0, 0, Counter[str](), count
    for k, problem in enumerate(problems(seed + 1, 100 * count, choices=(2, 12), options=(1, 4), limits=(1, 4))):
        name = sorted(SOLVERS)[k % len(SOLVERS)]
        if name in PAIR_SOLVERS and k % 2:
            draw = np.random.default_rng([seed + 1, k])
            problem = random_problem(draw, (2, 9), (1, 4), (1, 4), pairs=True)
        try:
            over += not counted(problem, solve(problem, name))
        except (OutOfReach, SolverGaveUp) as refusal:
            refused[type(refusal).__name__] += 1
            continue
        except QuantkitError as error:
            print(f"  problem {k}: {name} {error}")
            over += 1
        plans, left = plans + 1, left - 1
        if not left:
            break
    answers = ", ".join(f"{number:,} {kind}" for kind, number in refused.items())
    print(f"plans over a limit: {over} of {plans:,} by {len(SOLVERS)} solvers (besides: {answers})")
    return over


def processor_seconds() -> float:
    """Of this process and of solvers it waited for: what else the machine does is not counted."""
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + others.ru_utime + others.ru_stime


def large(seed: int) -> int:
    """Print time and gap of 500 layers x 8 formats x 3 limits; how many are not within 0.1 % in 10 s."""
    failed = 0
    print("500 layers x 8 formats x 3 limits:")
    for groups in (False, True):
        for problem in within_reach(seed + 2, 3, choices=(500, 500), options=(8, 8), limits=(3, 3), groups=groups):
            for name in ("pulp", "highs"):
                start = processor_seconds()
                solution = solve(problem, name, Settings(gap=gap_for(problem)))
                seconds = processor_seconds() - start
                failed += seconds > 10 or solution.gap > 1e-3 or not counted(problem, solution)
                print(f"  {name:<6} groups {groups!s:<6} {seconds:5.2f} s, gap {solution.gap:.1e}", flush=True)
    return failed


def quadratic_small(seed: int) -> int:
    """Print how many problems of up to 12 x 4 are proven optimal, and confirmed by brute force."""
    failed = 0
    for choices, count in ((6, 20), (9, 10), (12, 3)):
        proven, confirmed, slowest = 0, 0, 0.0
        # Groups double the options (by the tags they agree on), which brute force does not survive.
        kinds = {"choices": (choices, choices), "options": (4, 4), "limits": (1, 3), "pairs": True, "groups": False}
        for problem in within_reach(seed + 3, count, **kinds):
            start = time.perf_counter()
            solution = solve(problem, settings=Settings(gap=gap_for(problem)))
            slowest = max(slowest, time.perf_counter() - start)
            best = optimum(problem)
            assert best is not None
            proven += solution.proven
            # Where shifts cancel, the sum of pair terms is no more precise than they are.
            rounding = PRECISION * abs(best) + 1e-15 * float(np.abs(problem.pairs).max())
            confirmed += abs(solution.objective - best) <= rounding
        failed += 2 * count - proven - confirmed
        print(
            f"quadratic {choices} x 4: {proven} of {count} proven optimal, {confirmed} confirmed by brute force, "
            f"at most {slowest:.2f} s",
            flush=True,
        )
    return failed


def quadratic_large(seed: int, tabu_seconds: float, instances: int) -> int:
    """Print 40 x 5 against a tabu search; how many are over 1 % worse, or take over 60 s."""
    failed = 0
    kinds = {"choices": (40, 40), "options": (5, 5), "pairs": True, "groups": False}
    for number in range(instances):
        limits = 2 - number % 2
        problem = next(within_reach(seed + 4 + number, 1, limits=(limits, limits), **kinds))
        start = time.perf_counter()
        solution = solve(problem, settings=Settings(gap=gap_for(problem)))
        seconds = time.perf_counter() - start
        searched = Tabu(problem, np.random.default_rng(seed)).search(tabu_seconds)
        worse = solution.objective / searched - 1
        failed += worse > 0.01 or seconds > 60 or not counted(problem, solution)
        print(
            f"pair terms, 40 x 5, {limits} limits: {solution.objective:.6g} in {seconds:.1f} s, reported gap "
            f"{solution.gap:.2%}; tabu search of {tabu_seconds:.0f} s: {searched:.6g}; ours is {worse:+.3%} of that",
            flush=True,
        )
    return failed


def hawqv3_problems() -> list[Problem]:
    """The stored programs of HAWQ-V3; none where the benchmark data is absent."""
    path = Path(os.environ.get("QUANTKIT_DATA", "../shared/data")) / "hawqv3_ilp.json"
    models = json.loads(path.read_text())["models"].values() if path.is_file() else ()
    return [problem_of(model, configuration) for model in models for configuration in model["published"]]


def profile_problems(path: str) -> list[Problem]:
    """The problems of a stored profile at several budgets, one of them with a second limit."""
    profile = Profile.load(path)
    bops = 24 * sum(layer.macs for layer in profile.layers.values())
    budgets = [*(Budget(average_bits=bits) for bits in (2.5, 3, 4, 6)), Budget(average_bits=4, bops=bops)]
    return [allocation_problem(profile, budget.limits(profile)).problem for budget in budgets]


def compare(paths: Sequence[str], seed: int) -> int:
    """Print for every solver how far above the best found its objectives are, and its processor time; 0."""
    sums = {"groups": False, "pairs": False}
    families = {"HAWQ-V3 (18 programs)": hawqv3_problems()}
    for path in paths:
        family = profile_problems(path)
        families[f"profile {Path(path).stem}"] = family
        families[f"profile {Path(path).stem}, damages alone"] = [replace(one, pairs=None) for one in family]
    generated = {
        "20 x 5, 1 limit": {"choices": (20, 20), "limits": (1, 1), **sums},
        "50 x 5, 1 limit": {"choices": (50, 50), "limits": (1, 1), **sums},
        "50 x 5, 3 limits, groups": {"choices": (50, 50), "limits": (3, 3)},
        "12 x 5, pair terms": {"choices": (12, 12), "limits": (1, 2), "pairs": True, "groups": False},
        "40 x 5, pair terms": {"choices": (40, 40), "limits": (1, 2), "pairs": True, "groups": False},
    }
    for title, kinds in generated.items():
        families[title] = list(within_reach(seed + 9, 5, options=(5, 5), **kinds))
    for title, family in families.items():
        print(f"{title}:\n  {'solver':<10} {'plans':>5} {'best':>5} {'mean excess':>12} {'worst':>10} {'s each':>9}")
        rows = {name: [timed_solution(problem, name) for problem in family] for name in SOLVERS}
        best = [min(found for found, _ in column) for column in zip(*rows.values(), strict=True)]
        for name, row in rows.items():
            print(f"  {name:<10} {summary(row, best)}", flush=True)
    return 0


def timed_solution(problem: Problem, name: str) -> tuple[float, float]:
    """(objective, processor seconds); the objective is infinite where the solver gives up."""
    start = processor_seconds()
    try:
        objective = solve(problem, name, Settings(gap=gap_for(problem))).objective
    except QuantkitError:
        objective = math.inf
    return objective, processor_seconds() - start


def summary(row: Sequence[tuple[float, float]], best: Sequence[float]) -> str:
    """Plans, how many of them are the best of all solvers, mean and worst excess over the best, mean time."""
    excess = [found / least - 1 for (found, _), least in zip(row, best, strict=True) if found < math.inf]
    seconds = sum(spent for _, spent in row) / len(row) if row else 0.0
    if not excess:
        return f"{0:>5} {0:>5} {'':>12} {'':>10} {seconds:>9.4f}"
    wins = sum(one <= 1e-6 for one in excess)
    return f"{len(excess):>5} {wins:>5} {np.mean(excess):>12.2%} {max(excess):>10.2%} {seconds:>9.4f}"


class Tabu:
    """A long search for comparison: the best change of one or two choices that is not forbidden, better or worse.

    What was just left may not be taken again for a while; after a long time without gain much is changed at random.

    ``seconds`` decide when it ends: it is no part of the library, and what it finds depends on the machine."""

    PATIENCE = 3000

    def __init__(self, problem: Problem, generator: np.random.Generator) -> None:
        assert problem.pairs is not None
        self.pairs, self.draw = problem.pairs, generator
        counts = [len(choice.options) for choice in problem.choices]
        self.starts = np.cumsum([0, *counts[:-1]])
        self.choice = np.repeat(np.arange(len(counts)), counts)
        self.costs = np.array([option.costs for choice in problem.choices for option in choice.options])
        self.limits = np.array([limit for _, limit in problem.limits])
        share = (self.costs / np.maximum(self.limits, 1)).max(axis=1)
        self.cheapest = np.array([own[share[own].argmin()] for own in map(self.own, range(len(counts)))])

    def own(self, choice: int) -> np.ndarray:
        return np.flatnonzero(self.choice == choice)

    def value(self, now: np.ndarray) -> float:
        return 0.5 * float(self.pairs[np.ix_(now, now)].sum())

    def fits(self, now: np.ndarray) -> bool:
        return bool((self.costs[now].sum(axis=0) <= self.limits).all())

    def moves(self, now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(change of the objective when options a and b are both taken (a = b: only one), whether that fits)."""
        old = now[self.choice]
        shift = self.pairs[:, :] - self.pairs[old, :]
        slope = shift[:, now].sum(axis=1)
        cross = shift - shift[:, old]
        delta = slope[:, None] + slope[None, :] + cross + 0.5 * (np.diag(cross)[:, None] + np.diag(cross)[None, :])
        delta[np.diag_indices(len(old))] = slope + 0.5 * np.diag(cross)
        extra, room = self.costs - self.costs[old], self.limits - self.costs[now].sum(axis=0)
        both = extra[:, None, :] + extra[None, :, :]
        both[np.diag_indices(len(old))] = extra
        good = (both <= room).all(axis=2)
        good &= (self.choice[:, None] != self.choice[None, :]) | np.eye(len(old), dtype=bool)
        good[now, :] = good[:, now] = False
        return delta, good

    def search(self, seconds: float) -> float:
        """The least objective found in so many seconds."""
        end, now = time.perf_counter() + seconds, self.cheapest.copy()
        until, step, last = np.zeros(len(self.choice), dtype=np.int64), 0, 0
        value = best = self.value(now)
        while time.perf_counter() < end:
            step += 1
            delta, good = self.moves(now)
            free = (until[:, None] <= step) & (until[None, :] <= step)
            delta[~(good & (free | (value + delta < best - 1e-12 * abs(best))))] = np.inf
            a, b = divmod(int(delta.argmin()), len(delta))
            if np.isfinite(delta[a, b]):
                changed = np.unique([a, b])
                until[now[self.choice[changed]]] = step + self.draw.integers(5, 25)
                now[self.choice[changed]] = changed
                value = self.value(now)
            if value < best * (1 - 1e-12):
                best, last = value, step
            elif step - last > self.PATIENCE or not np.isfinite(delta[a, b]):
                now, last = self.shaken(now), step
                value = self.value(now)
        return best

    def shaken(self, now: np.ndarray) -> np.ndarray:
        """Half of the choices at random, then one after the other at its cheapest until the limits hold."""
        order = self.draw.permutation(len(now))
        changed = now.copy()
        for choice in order[: len(order) // 2]:
            changed[choice] = self.draw.choice(self.own(choice))
        for choice in self.draw.permutation(len(now)):
            if self.fits(changed):
                break
            changed[choice] = self.cheapest[choice]
        return changed if self.fits(changed) else self.cheapest.copy()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", type=int, default=3000, metavar="N", help="random problems for brute force")
    parser.add_argument("--feasibility", type=int, default=10000, metavar="N", help="plans counted again")
    parser.add_argument("--large", action="store_true", help="500 layers x 8 formats x 3 limits")
    parser.add_argument("--quadratic", action="store_true", help="12 x 4 proven, 40 x 5 against a tabu search")
    parser.add_argument("--compare", nargs="*", metavar="PROFILE", help="quality and time of every solver")
    parser.add_argument("--tabu-seconds", type=float, default=600.0, metavar="S")
    parser.add_argument("--instances", type=int, default=1, metavar="N", help="of 40 x 5, 2 limits and 1 in turn")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    failed = agreement(asked.problems, asked.seed) if asked.problems else 0
    failed += feasibility(asked.feasibility, asked.seed) if asked.feasibility else 0
    failed += large(asked.seed) if asked.large else 0
    failed += compare(asked.compare, asked.seed) if asked.compare is not None else 0
    if asked.quadratic:
        failed += quadratic_small(asked.seed) + quadratic_large(asked.seed, asked.tabu_seconds, asked.instances)
    print("everything as it should be" if not failed else f"{failed} not as it should be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
