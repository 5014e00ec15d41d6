"""What a runtime can run: formats per layer kind, fusion rules and defaults, read from a data file beside this one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

import yaml

from quantkit.errors import InvalidRequest, did_you_mean
from quantkit.formats import Scheme


@dataclass(frozen=True)
class Target:
    """A runtime, as data. ``layers`` are the kinds it runs quantized; ``output_coded`` those of them whose kernels
    write codes; ``integer_ops`` the element-wise operations it runs on codes; ``fused_activations`` what it fuses into
    both.
    """

    name: str
    description: str
    layers: tuple[str, ...]
    weight_bits: tuple[int, ...]
    weight_groups: bool
    weight_zero_points: bool
    activation_bits: tuple[int, ...]
    default_schemes: tuple[str, ...]
    output_coded: tuple[str, ...]
    fused_activations: tuple[str, ...]
    integer_ops: tuple[str, ...]

    @classmethod
    def load(cls, name: str | Target) -> Target:
        """The target of this name; raises InvalidRequest with the known names."""
        if isinstance(name, Target):
            return name
        if name not in target_names():
            known = target_names()
            raise InvalidRequest(
                f"Unknown target {name!r}; known: {', '.join(known)}.{did_you_mean(str(name), known)}"
            )
        data = yaml.safe_load((resources.files(__package__) / f"{name}.yaml").read_text())
        values: dict[str, Any] = {f.name: data[f.name] for f in fields(cls)}
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**values)

    def refusal(self, scheme: Scheme) -> str | None:
        """Why this target cannot run a scheme, None when it can."""
        problem = None if scheme.is_float else self._unsupported(scheme)
        return None if problem is None else problem.replace("?", f"not supported by target {self.name} yet")

    def _unsupported(self, scheme: Scheme) -> str | None:
        weight, act = scheme.weight, scheme.activation
        if weight is None or act is None:
            return f"{scheme} is ?: a layer needs a weight and an activation format"
        if not weight.is_integer or weight.bits not in self.weight_bits:
            return f"weight format {weight} is ? (bits: {_list(self.weight_bits)})"
        if weight.group and not self.weight_groups:
            return f"weight groups ({weight}) are ?"
        if weight.zero_point and not self.weight_zero_points:
            return f"weight zero points ({weight}) are ?"
        if weight.scale != "f32":
            return f"{weight.scale} scales ({weight}) are ?"
        if not act.is_integer or act.bits not in self.activation_bits or act.dynamic or act.group:
            return f"activation format {act} is ? (static, bits: {_list(self.activation_bits)})"
        return None


def _list(values: tuple[int, ...]) -> str:
    return ", ".join(str(v) for v in values)


def target_names() -> list[str]:
    """Names of the targets this installation carries."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files(__package__).iterdir() if p.name.endswith(".yaml")
    )
