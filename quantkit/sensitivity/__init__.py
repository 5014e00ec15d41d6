"""Estimators of the damage that formats do: a name, and a function of (subject, perturbations, progress) giving
Scores.
"""

from __future__ import annotations

from collections.abc import Callable

from quantkit.sensitivity.gram import gram
from quantkit.sensitivity.measure import Scores

ESTIMATORS: dict[str, Callable[..., Scores]] = {"gram": gram}
