"""``quantkit list``: the names one may use."""

from __future__ import annotations

from pathlib import Path

from quantkit.allocation.registry import SOLVERS
from quantkit.formats import HALF
from quantkit.ranges.activations import RANGES
from quantkit.recipe.sources import METRICS
from quantkit.reconstruction.blocks import RECONSTRUCTIONS
from quantkit.reconstruction.corrections import CORRECTIONS
from quantkit.rounding import AUTO, ROUNDINGS
from quantkit.sensitivity import ESTIMATORS, RANKINGS
from quantkit.stages.first_last import FIRST_LAST
from quantkit.stages.operating_point import EFFORTS
from quantkit.stages.options import FLOAT16, FLOAT32, REPARAMETERIZATIONS
from quantkit.targets import Target, target_names
from quantkit.transforms.known import TRANSFORMS


def inventory(folder: Path = Path("recipes")) -> str:
    """Formats of every target, and the names of estimators, solvers, roundings, ranges, metrics and recipes."""
    lines = []
    for name in target_names():
        target = Target.load(name)
        floats = (f"w{HALF}", "float") if target.float16_weights else ("float",)
        minifloats = [f"w{fmt}" for fmt in target.weight_only_floats] + [
            f"a{fmt}d" for fmt in target.activation_floats
        ]
        lines += [
            f"target         {name}: {target.description}",
            f"  schemes      {', '.join((*target.default_schemes, *minifloats, *floats))}",
            f"  layers       {', '.join(target.layers)}",
            f"  weights only {', '.join(target.weight_only_layers)}",
        ]
    for title, names in (
        ("sensitivity", [name for name in ESTIMATORS if name not in RANKINGS]),
        ("rankings", [name for name in ESTIMATORS if name in RANKINGS]),
        ("solver", SOLVERS),
        ("effort", EFFORTS),
        ("first_last", FIRST_LAST),
        ("float_storage", (FLOAT32, FLOAT16)),
        ("rounding", (AUTO, *ROUNDINGS)),
        ("ranges", RANGES),
        ("transforms", ("auto", "none", *TRANSFORMS)),
        ("reconstruction", RECONSTRUCTIONS),
        ("correction", CORRECTIONS),
        ("reparameterization", REPARAMETERIZATIONS),
        ("metric", METRICS),
    ):
        hint = " (only order layers: for solver by-rank)" if title == "rankings" else ""
        lines.append(f"{title:<14} {', '.join(names)}{hint}")
    recipes = sorted(str(path) for path in folder.glob("*.yaml"))
    lines.append(f"{'recipes':<14} {', '.join(recipes) or f'none in {folder}/'}")
    return "\n".join(lines)
