"""Do limits on accuracy hold, and several limits at once? ResNet20, asked for and then measured.

    python tools/study_limits.py [--drop 0.5] [--effort fast] [--reconstruction auto] [--workdir out/limits]

The metric is top-1 on the first half of the evaluation images; the second half decides nothing and is printed beside
it. Asked for: the least size with an accuracy drop of at most ``--drop`` points; the least bit-operations within that
drop and 1.1 times that size, two limits at once; and the same drop at three quarters of that size, which no plan
keeps. Several plans are applied for each, so ``--reconstruction network`` saves most of the time.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from study_sensitivity import REPOSITORY

import quantkit
from quantkit.allocation.plan_costs import counted
from quantkit.errors import AccuracyNotMet
from quantkit.recipe.read import read_recipe
from quantkit.recipe.run import inputs_of, items_of
from quantkit.stages.metric import metric_of
from quantkit.stages.result import Result

RECIPE = REPOSITORY / "recipes" / "resnet20_cifar10.yaml"
HALF = 2500


def recipe_of(half: int) -> Any:
    """The recipe with one half of the evaluation images."""
    return read_recipe(RECIPE, [f"evaluate.select=[{half * HALF}, {(half + 1) * HALF}]"])


def quantized(budget: str, options: argparse.Namespace) -> Result:
    recipe = recipe_of(0)
    inputs = inputs_of(recipe)
    asked = {"budget": budget, "effort": options.effort, "reconstruction": options.reconstruction}
    return quantkit.quantize(
        inputs.model,
        calibration=items_of(inputs.calibration),
        evaluate=inputs.evaluate,
        workdir=options.workdir,
        **recipe.settings() | asked,
    )


def report(title: str, result: Result, minimized: str) -> None:
    """One block of figures: what was asked, what was counted and measured."""
    other = inputs_of(recipe_of(1))
    before, after = (metric_of(other.evaluate, model) for model in (other.model, result.model))
    plan, metrics = result.plan, result.metrics
    own = counted(result.profile, plan.schemes, plan.sites, minimized)
    cheaper = [drop for cost, drop in result.curve if cost < own]
    print(f"\n{title}")
    print(f"  size {plan.total_bytes:,} bytes, {plan.average_bits:.3f} bits on average")
    print(f"  drop on the half that decides {metrics['float'] - metrics['quantized']:.2f}", end="")
    print(f" (95 % confidence bound {metrics['drop_bound']:.2f}), {metrics['evaluations']:.0f} plans evaluated")
    print(f"  drop on the other half {before - after:.2f}")
    print(f"  least drop of an applied plan with less {minimized} {min(cheaper, default=math.nan):.2f}")
    points = ", ".join(f"{drop:.2f} at {cost:,.0f}" for cost, drop in result.curve)
    print(f"  applied: {points}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--drop", type=float, default=0.5)
    parser.add_argument("--effort", default="fast", choices=("fast", "balanced", "thorough"))
    parser.add_argument("--reconstruction", default="auto", help="how the plans are applied (default auto)")
    parser.add_argument("--workdir", type=Path, default=Path("out/limits"))
    options = parser.parse_args()
    first = quantized(f"accuracy_drop={options.drop}", options)
    report(f"accuracy drop at most {options.drop}, least size", first, "size")
    size = round(1.1 * first.plan.total_bytes)
    budget = f"{size} B, accuracy_drop={options.drop}, minimize=bops"
    report(budget, quantized(budget, options), "bops")
    try:
        quantized(f"{3 * size // 4} B, accuracy_drop={options.drop}", options)
    except AccuracyNotMet as error:
        print(f"\nthree quarters of that size, the same drop: exit code {error.exit_code}. {error}")


if __name__ == "__main__":
    main()
