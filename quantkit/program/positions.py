"""Which arguments of a model the items of a tuple are: what loaders give beside inputs must not be taken for one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from quantkit.program.intercept import forward_parameters
from quantkit.progress import notice

_LABELS = re.compile(r"(^|_)(labels?|targets?|y|y_true|gt|ground_truth)(_ids)?$")


@dataclass(frozen=True)
class Positions:
    """The parameters of a forward that tuples fill, in order: the ``required`` ones first, then ``optional`` ones up
    to the first that is named for labels. ``any_number``: a forward takes as many as come.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    any_number: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Positions:
        """Those of a model."""
        parameters = forward_parameters(model)
        if not parameters or any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return cls((), (), any_number=True)
        own = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        required = [p.name for p in own if p.default is p.empty]
        optional = [p.name for p in own if p.default is not p.empty]
        labels = next((i for i, name in enumerate(optional) if _LABELS.search(name)), len(optional))
        return cls(tuple(required), tuple(optional[:labels]))

    def filled(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The items of a tuple that the model is called with."""
        return args if self.any_number else args[: len(self.required) + len(self.optional)]

    def tell(self, items: int) -> None:
        """Say what is done with tuples of so many items, beyond filling what has to be filled."""
        surplus = items - len(self.required)
        if self.any_number or surplus <= 0:
            return
        bound = self.optional[:surplus]
        if bound:
            notice(
                f"calibration items fill the optional argument{'s' * (len(bound) > 1)} {', '.join(bound)} of the "
                "model's forward too; where they hold something else, pass dicts with the arguments' names"
            )
        if (more := surplus - len(bound)) > 0:
            notice(f"calibration items carry {more} more value(s) than the model takes (labels?): not used")
