"""Estimators of the damage that formats do: a name, and a function of (subject, perturbations, progress, generator)
giving Scores.
"""

from __future__ import annotations

from quantkit.sensitivity import (  # noqa: F401  # registered by name
    depth,
    first_order,
    fisher,
    gram,
    hessian_eigenvalue,
    hessian_trace,
    hvp_pairs,
    kl,
    lim,
    noise,
    pairwise,
    weight_error,
    zd,
)
from quantkit.sensitivity.registry import COSTS, ESTIMATORS, NO_INPUTS, RANKINGS, require_additive

__all__ = ["COSTS", "ESTIMATORS", "NO_INPUTS", "RANKINGS", "require_additive"]
