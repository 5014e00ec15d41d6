"""What a runtime can run: formats per layer kind, fusion rules and defaults, read from a data file beside this one."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from quantkit.errors import CorruptFile, InvalidRequest, did_you_mean
from quantkit.formats import ActivationFormat, Scheme
from quantkit.plan.latency import LatencyTable
from quantkit.store import write_atomically

SUFFIXES = (".yaml", ".yml", ".json")
_HEAD = "# Times of one model on one machine, measured by `quantkit bench`. Pass this file as target.\n"


@dataclass(frozen=True)
class Target:
    """A runtime, as data. ``layers`` are the kinds it runs quantized; ``output_coded`` those of them whose kernels
    write codes; ``integer_ops`` the element-wise operations it runs on codes, ``integer_products`` the products of two
    activations; ``fused_activations`` what it fuses into layers and element-wise operations; ``weight_only``: it
    expands stored codes and computes in float; ``dynamic_layers`` the kinds whose inputs it can quantize token by
    token. ``latency``: what a model's parts take on a machine, where that was
    measured.
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
    integer_products: tuple[str, ...] = ()
    weight_only: bool = False
    dynamic_layers: tuple[str, ...] = ()
    latency: LatencyTable | None = None

    @classmethod
    def load(cls, name: str | os.PathLike[str] | Target) -> Target:
        """The target of this name, or of a file that ``quantkit bench`` wrote; raises InvalidRequest with the known
        names, or for a file that cannot be read, CorruptFile for one that is something else.
        """
        if isinstance(name, Target):
            return name
        if is_target_file(name):
            return cls._of_file(Path(name))
        if name not in target_names():
            known = target_names()
            raise InvalidRequest(
                f"Unknown target {name!r}; known: {', '.join(known)}.{did_you_mean(str(name), known)}"
            )
        data = yaml.safe_load((resources.files(__package__) / f"{name}.yaml").read_text())
        values: dict[str, Any] = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**values)

    @classmethod
    def _of_file(cls, path: Path) -> Target:
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
            table = LatencyTable.from_dict(data["latency"])
            base = data["target"]
        except OSError as error:
            raise InvalidRequest(
                f"Cannot read the target file {str(path)!r}: {error.strerror or error}. `quantkit bench RECIPE` "
                "writes one."
            ) from error
        except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            found = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise CorruptFile(
                f"{str(path)!r} is not a target file of `quantkit bench` ({found.rstrip('.')}). Run it again."
            ) from error
        return replace(cls.load(base), latency=table)

    def save(self, path: str | Path) -> Path:
        """Write the file that ``load`` reads: the target's name and its latency table, as YAML."""
        if self.latency is None:
            raise InvalidRequest(f"Target {self.name} has no latency table to save: `quantkit bench` measures one.")
        data = {"target": self.name, "latency": self.latency.to_dict()}
        text = _HEAD + yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=119)
        return write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))

    def refusal(self, scheme: Scheme) -> str | None:
        """Why this target cannot run a scheme, None when it can."""
        problem = None if scheme.is_float else self._unsupported(scheme)
        return None if problem is None else problem.replace("?", f"not supported by target {self.name} yet")

    def _unsupported(self, scheme: Scheme) -> str | None:
        weight, act = scheme.weight, scheme.activation
        if weight is None:
            return f"{scheme} is ?: a layer needs a weight format"
        if act is None and not self.weight_only:
            return f"{scheme} is ?: a layer needs an activation format"
        if not weight.is_integer or weight.bits not in self.weight_bits:
            return f"weight format {weight} is ? (bits: {_list(self.weight_bits)})"
        if weight.group and not self.weight_groups:
            return f"weight groups ({weight}) are ?"
        if weight.zero_point and not self.weight_zero_points:
            return f"weight zero points ({weight}) are ?"
        if weight.scale != "f32":
            return f"{weight.scale} scales ({weight}) are ?"
        if act is not None and not self._runs(act):
            return f"activation format {act} is ? ({self._ways()}, bits: {_list(self.activation_bits)})"
        return None

    def _runs(self, act: ActivationFormat) -> bool:
        in_time = not act.dynamic or bool(self.dynamic_layers)
        return act.is_integer and act.bits in self.activation_bits and in_time and not act.group

    def _ways(self) -> str:
        return "static or per token" if self.dynamic_layers else "static"


def is_target_file(name: object) -> bool:
    """Whether a target is given as a file."""
    return isinstance(name, os.PathLike) or (isinstance(name, str) and name.endswith(SUFFIXES))


def _list(values: tuple[int, ...]) -> str:
    return ", ".join(str(v) for v in values)


def target_names() -> list[str]:
    """Names of the targets this installation carries."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files(__package__).iterdir() if p.name.endswith(".yaml")
    )
