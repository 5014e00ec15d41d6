"""How good can a plan get? A long search on measured damage, as a yardstick for quick ones.

    python tools/long_search.py [--models resnet20] [--rounding gptq nearest] [--bits 2.25 2.5 3 3.5 4]

Weights only, formats of 2, 3, 4, 6 and 8 bits. From several starts (the profile's plan, greedy, uniform) it switches
the formats of a few layers at a time, keeps the size within the limit, and keeps what lowers the damage that
``effort`` compares plans by (of softened outputs, on mixed, mirrored and shifted calibration images): sixteen
variations on an eighth of them, the best four of those on a half, the best on all. A start is given up after
``--patience`` rounds without a gain, the search after ``--evaluations`` plans. For the best of all plans it prints the
damage it was chosen by and the KL divergence on evaluation images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from study_allocation import BITS, Study, add_arguments, studies

from quantkit.allocation.allocate import plan_of, recount
from quantkit.allocation.from_profile import AllocationProblem, allocation_problem, assignment_of
from quantkit.allocation.problem import Assignment
from quantkit.budget import Budget
from quantkit.plan import Plan
from quantkit.progress import notice
from quantkit.sensitivity.around import PlanDamage
from quantkit.stages.operating_point import measurements_of

VARIATIONS, SECOND, PARTS = 16, 4, (0.125, 0.5)
STARTS = ("profile", "greedy", "uniform")


@dataclass
class LongSearch:
    """The state of the search. Levels are positions in a layer's options, which go from few bits to many."""

    study: Study
    allocation: AllocationProblem
    measurements: PlanDamage
    draw: np.random.Generator
    evaluations: int = 0
    seen: set[tuple[int, ...]] = field(default_factory=set)

    def measured(self, levels: Sequence[Assignment], share: float = 1.0) -> list[float]:
        self.evaluations += len(levels)
        profile = self.study.profile
        return self.measurements.plans([profile.chosen(*self.allocation.decode(one)) for one in levels], share)

    def used(self, levels: Sequence[int]) -> int:
        options = [c.options[k] for c, k in zip(self.allocation.problem.choices, levels, strict=True)]
        return sum(option.costs[0] for option in options)

    def variation(self, levels: Assignment) -> Assignment:
        """One to three layers a format up or down, then others down until the plan fits and up until it is full."""
        changed, top = list(levels), len(BITS) - 1
        for layer in self.draw.permutation(len(changed))[: int(self.draw.integers(1, 4))]:
            step = 1 if changed[layer] == 0 else -1 if changed[layer] == top else int(self.draw.choice((-1, 1)))
            changed[layer] += step
        limit = self.allocation.problem.limits[0][1]
        while self.used(changed) > limit:
            changed[self.draw.choice([i for i, level in enumerate(changed) if level > 0])] -= 1
        for layer in self.draw.permutation(len(changed)):
            fuller = [level + (i == layer) for i, level in enumerate(changed)]
            if fuller[layer] <= top and self.used(fuller) <= limit:
                changed = fuller
        return tuple(changed)

    def round(self, levels: Assignment, damage: float) -> tuple[Assignment, float]:
        """The best of some variations not seen before, where it is better."""
        fresh = {self.variation(levels) for _ in range(4 * VARIATIONS)} - self.seen - {levels}
        few = sorted(fresh)[:VARIATIONS] if len(fresh) <= VARIATIONS else self._some(sorted(fresh))
        self.seen.update(few)
        for share, keep in zip(PARTS, (SECOND, 1), strict=True):
            if not few:
                return levels, damage
            here, *damages = self.measured([levels, *few], share)
            few = [few[k] for k in np.argsort(damages, kind="stable")[:keep] if damages[k] < here]
        if not few:
            return levels, damage
        (lowest,) = self.measured(few)
        return (few[0], lowest) if lowest < damage else (levels, damage)

    def _some(self, levels: Sequence[Assignment]) -> list[Assignment]:
        return [levels[k] for k in self.draw.choice(len(levels), VARIATIONS, replace=False)]

    def climb(self, start: Assignment, patience: int, most: int) -> tuple[Assignment, float]:
        """From a start until ``patience`` rounds in a row gained nothing, or ``most`` plans were measured in all."""
        levels, damage = start, self.measured([start])[0]
        idle = 0
        while idle < patience and self.evaluations < most:
            better, lower = self.round(levels, damage)
            idle = idle + 1 if better == levels else 0
            levels, damage = better, lower
        return levels, damage


def search(study: Study, bits: float, patience: int, most: int, seed: int) -> tuple[Plan, float, int]:
    """(the best plan, its measured damage, plans measured)."""
    limits = Budget(average_bits=bits).limits(study.profile)
    allocation = allocation_problem(study.profile, limits)
    measurements = measurements_of(study.evaluator, seed, progress=False)
    walk = LongSearch(study, allocation, measurements, np.random.default_rng(seed))
    best, lowest = None, np.inf
    for name in STARTS:
        levels, damage = walk.climb(
            assignment_of(study.profile, allocation, study.plan(name, bits, seed)), patience, most
        )
        notice(f"{bits} bits from {name}: damage {damage:.5f} after {walk.evaluations} plans")
        if damage < lowest:
            best, lowest = levels, damage
    assert best is not None
    plan = plan_of(study.profile, allocation, best)
    recount(plan, study.profile, limits)
    return plan, lowest, walk.evaluations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--evaluations", type=int, default=20_000, help="plans measured at most, per budget")
    parser.add_argument("--patience", type=int, default=30, help="rounds without a gain that end a start")
    options = parser.parse_args()
    for title, study in studies(options, STARTS):
        print(f"\n{title}: the best plan of a long search\n{'bits':5} {'calibration':>12} {'unseen':>12} {'plans':>8}")
        for bits in options.bits:
            plan, damage, count = search(study, bits, options.patience, options.evaluations, options.seed)
            print(f"{bits:<5} {damage:>12.5f} {study.unseen(plan):>12.5f} {count:>8}", flush=True)
            print("      " + " ".join(str(plan.schemes[name])[1:] for name in study.profile.layers), flush=True)


if __name__ == "__main__":
    main()
