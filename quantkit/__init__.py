"""Mixed-precision post-training quantization: your model, your limit, a file you can deploy."""

from quantkit.allocation.allocate import allocate
from quantkit.allocation.pareto import pareto
from quantkit.api import apply, profile, quantize
from quantkit.budget import Budget
from quantkit.errors import QuantkitError
from quantkit.formats import Scheme
from quantkit.plan import Plan, Profile
from quantkit.recipe.run import load
from quantkit.stages.result import Result, export_onnx
from quantkit.targets import Target
from quantkit.version import VERSION as __version__

__all__ = [
    "Budget",
    "Plan",
    "Profile",
    "QuantkitError",
    "Result",
    "Scheme",
    "Target",
    "__version__",
    "allocate",
    "apply",
    "export_onnx",
    "load",
    "pareto",
    "profile",
    "quantize",
]
