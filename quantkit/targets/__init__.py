"""What a runtime can run: formats per layer kind, fusion rules, roles, defaults, from its backend's data file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from quantkit.errors import CorruptFile, InvalidRequest, did_you_mean
from quantkit.formats import BLOCKS, ActivationFormat, Scheme, WeightFormat
from quantkit.plan import digest_of
from quantkit.plan.latency import LatencyTable
from quantkit.store import write_atomically
from quantkit.targets.instruction_sets import AUTO, INSTRUCTION_SETS, detected_instruction_set
from quantkit.targets.roles import ADDITION_RESULT, CANNOT, CODES, FOR_PRODUCTS, MAY, MUST, ROLES

# Name of a target -> its data file among the backends, which are not imported for it.
DATA_FILES = {"onnxruntime-cpu": "onnxruntime/target.yaml", "torch": "torch/target.yaml"}
SUFFIXES = (".yaml", ".yml", ".json")
OPERATOR_DOMAINS = "operator_domains"  # their place in a plan's provenance
_HEAD = "# Times of one model on one machine, measured by `quantkit bench`. Pass this file as target.\n"


@dataclass(frozen=True)
class Target:
    """A runtime, as data.

    ``layers`` are the kinds it runs on codes, ``weight_only_layers`` those whose weights it stores as codes and that
    compute in float; ``output_coded`` the kinds whose kernels write codes, ``dynamic_layers`` those whose inputs it
    can quantize token by token. ``integer_ops`` are the element-wise operations it runs on codes, ``integer_products``
    the products of two activations, ``fused_activations`` what it fuses into layers and element-wise operations.
    ``weight_floats`` and ``activation_floats`` are formats of floating-point numbers that its kernels read, of
    activations token by token; ``weight_scales`` the types of scales. ``weight_only``: every layer can have codes for
    its weight alone; ``weight_only_groups``: also in groups and with zero points; ``weight_only_floats`` and
    ``weight_only_scales``: what it stores for them; ``float16_weights``: or float16 values, ``w16``. ``writes_files``:
    there are files that it runs. ``instruction_set`` is that of the CPUs that files are written for,
    ``operator_domains`` the operator sets that they may use beside the format's own, ``roles`` whether tensors must,
    may or cannot hold codes in each role (``targets.roles``); they may in one that is not named.
    ``latency``: what a model's parts take on a machine, where that was measured.
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
    weight_only_layers: tuple[str, ...] = ()
    weight_floats: tuple[str, ...] = ()
    activation_floats: tuple[str, ...] = ()
    weight_scales: tuple[str, ...] = ("f32",)
    weight_only: bool = False
    weight_only_groups: bool = False
    weight_only_floats: tuple[str, ...] = ()
    weight_only_scales: tuple[str, ...] = ("f32",)
    float16_weights: bool = False
    writes_files: bool = True
    dynamic_layers: tuple[str, ...] = ()
    instruction_set: str = AUTO
    operator_domains: tuple[str, ...] = ()
    roles: Mapping[str, str] = field(default_factory=dict)
    latency: LatencyTable | None = None

    def __post_init__(self) -> None:
        if self.instruction_set not in INSTRUCTION_SETS:
            raise InvalidRequest(
                f"Target {self.name} has no instruction set {self.instruction_set!r}; known: "
                f"{', '.join(INSTRUCTION_SETS)}.{did_you_mean(str(self.instruction_set), INSTRUCTION_SETS)}"
            )
        for role, codes in self.roles.items():
            if role not in ROLES or codes not in CODES:
                raise InvalidRequest(
                    f"Target {self.name} says {codes!r} of the role {role!r}; roles: {', '.join(ROLES)}; each "
                    f"{', '.join(CODES)} hold codes."
                )

    @classmethod
    def load(cls, name: str | os.PathLike[str] | Target) -> Target:
        """The target of this name, which an instruction set may follow (``onnxruntime-cpu:avx2``), or of a file that
        ``quantkit bench`` wrote; raises InvalidRequest with the known names, or for a file that cannot be read,
        CorruptFile for one that is something else.
        """
        if isinstance(name, Target):
            return name
        if is_target_file(name):
            return cls._of_file(Path(name))
        plain, named, instruction_set = str(name).partition(":")
        if not isinstance(name, str) or plain not in DATA_FILES:
            known = target_names()
            raise InvalidRequest(f"Unknown target {name!r}; known: {', '.join(known)}.{did_you_mean(plain, known)}")
        data = yaml.safe_load((resources.files("quantkit.backends") / DATA_FILES[plain]).read_text())
        values: dict[str, Any] = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**values | ({"instruction_set": instruction_set} if named else {}))

    @classmethod
    def _of_file(cls, path: Path) -> Target:
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
            table = LatencyTable.from_dict(data["latency"])
            base, instruction_set = data["target"], data.get("instruction_set", AUTO)
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
        return replace(cls.load(base), instruction_set=instruction_set, latency=table)

    def save(self, path: str | Path) -> Path:
        """Write the file that ``load`` reads: the target's name, instruction set and latency table, as YAML."""
        if self.latency is None:
            raise InvalidRequest(f"Target {self.name} has no latency table to save: `quantkit bench` measures one.")
        data = {"target": self.name, "instruction_set": self.instruction_set, "latency": asdict(self.latency)}
        text = _HEAD + yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=119)
        return write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))

    def resolved(self, known: str | None = None) -> Target:
        """With the instruction set that files are written for: its own, else the ``known`` one, as of an earlier plan,
        else this machine's.
        """
        if self.instruction_set != AUTO:
            return self
        return replace(self, instruction_set=known or detected_instruction_set())

    def digest(self) -> str:
        """Identifies what codes and damages depend on: not the machine that files are written for or timed on."""
        return digest_of(asdict(replace(self, latency=None, instruction_set=AUTO, operator_domains=())))

    def require_files(self) -> None:
        """Raise InvalidRequest for a target without files."""
        if not self.writes_files:
            raise InvalidRequest(
                f"Target {self.name} reads no files, so that there is none to write. Run result.model, keep it by "
                "result.save, or quantize for a target that has files, such as onnxruntime-cpu."
            )

    def can_hold_codes(self, role: str) -> bool:
        """Whether tensors in this role can hold codes."""
        return self.roles.get(role, MAY) != CANNOT

    @property
    def adds_for_products(self) -> bool:
        """Whether sums run on codes only where codes are of use to a layer or a product of activations."""
        return self.roles.get(ADDITION_RESULT) == FOR_PRODUCTS

    def role_of_codes(self, roles: Iterable[str]) -> str | None:
        """The role, of those that a tensor has, in which it must hold codes; None where it may stay float."""
        return next((role for role in roles if self.roles.get(role, MAY) == MUST), None)

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
        if weight.is_half and self.float16_weights:
            return None if act is None else f"{scheme} is ?: float16 weights compute in float, as {weight} alone"
        floats = self.weight_floats if act is not None else self.weight_only_floats
        if weight.fmt not in floats and not (weight.is_integer and weight.bits in self.weight_bits):
            return f"weight format {weight} is ? (bits: {_list((*self.weight_bits, *floats))})"
        return self._unsupported_scales(weight, act) or self._unsupported_activation(act)

    def _unsupported_scales(self, weight: WeightFormat, act: ActivationFormat | None) -> str | None:
        if weight.fmt in BLOCKS:
            return None
        expanded = act is None and self.weight_only_groups
        if weight.group and not self.weight_groups and not expanded:
            return f"weight groups ({weight}) are ?"
        if weight.zero_point and not self.weight_zero_points and not expanded:
            return f"weight zero points ({weight}) are ?"
        if weight.scale not in (self.weight_scales if act is not None else self.weight_only_scales):
            return f"{weight.scale} scales ({weight}) are ?"
        return None

    def _unsupported_activation(self, act: ActivationFormat | None) -> str | None:
        if act is None or self._runs(act):
            return None
        ways = "static or per token" if self.dynamic_layers else "static"
        tokens = f"; per token: {_list(self.activation_floats)}" if self.activation_floats else ""
        return f"activation format {act} is ? ({ways}, bits: {_list(self.activation_bits)}{tokens})"

    def _runs(self, act: ActivationFormat) -> bool:
        in_time = not act.dynamic or bool(self.dynamic_layers)
        whole = act.is_integer and act.bits in self.activation_bits
        return (whole or (act.dynamic and act.fmt in self.activation_floats)) and in_time and not act.group


def is_target_file(name: object) -> bool:
    """Whether a target is given as a file."""
    return isinstance(name, os.PathLike) or (isinstance(name, str) and name.endswith(SUFFIXES))


def _list(values: tuple[int | str, ...]) -> str:
    return ", ".join(str(v) for v in values)


def target_names() -> list[str]:
    """Names of the targets this installation carries."""
    return sorted(DATA_FILES)
