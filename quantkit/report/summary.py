"""The table at the end of a run: float against quantized, in accuracy, bytes and time, and why each layer got its
bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantkit.errors import InvalidRequest, did_you_mean
from quantkit.plan import COMPOSITION, Plan


@dataclass(frozen=True)
class Measured:
    """What a run measured. Bytes are those of the ONNX files, ``weight_bytes`` those of the layers' weights counted in
    the quantized one; ``latency_ratio`` is quantized / float time of a run in onnxruntime (one thread, a batch of
    ``latency_batch``); metrics are percent, None where the recipe evaluates nothing.
    """

    float_bytes: int
    quantized_bytes: int
    weight_bytes: int
    latency_ratio: float
    latency_batch: int
    metrics: Mapping[str, float]
    minimum_runtime: str


ROWS = {
    "float": "metric of the float model",
    "quantized": "metric of the quantized model, simulated",
    "onnx": "metric of the ONNX file in onnxruntime",
    "agreement": "same largest output, simulated and onnxruntime (%)",
    "calibration_damage": "damage on the calibration inputs",
    "calibration_agreement": "same largest output as the float model, calibration inputs",
}


def summary(plan: Plan, measured: Measured) -> str:
    """The table as text."""
    saved = 1 - measured.quantized_bytes / measured.float_bytes
    change = f"{abs(saved):.0%} {'smaller' if saved >= 0 else 'larger'}"
    rows = [(label, f"{measured.metrics[key]:.6g}") for key, label in ROWS.items() if key in measured.metrics]
    rows += [
        ("ONNX file, float", f"{measured.float_bytes:,} bytes"),
        ("ONNX file, quantized", f"{measured.quantized_bytes:,} bytes ({change})"),
        ("weights of the layers, planned", f"{plan.size_bytes:,} bytes, {plan.average_bits:.3f} bits on average"),
        ("weights of the layers, in the file", f"{measured.weight_bytes:,} bytes, {stored_bits(plan, measured)}"),
        (f"time in onnxruntime, batch {measured.latency_batch}", _time(plan, measured)),
        ("onnxruntime needed", f"{measured.minimum_runtime} or newer"),
    ]
    width = max(len(label) for label, _ in rows)
    table = [f"{label:<{width}}  {value}" for label, value in rows]
    table += [str(plan.provenance[COMPOSITION])] if COMPOSITION in plan.provenance else []
    return "\n".join([*table, "", layer_table(plan)])


def _time(plan: Plan, measured: Measured) -> str:
    predicted = plan.provenance.get("latency_ratio")
    promise = "" if predicted is None else f" (predicted {predicted:.2f})"
    return f"{measured.latency_ratio:.2f} of float{promise}"


def stored_bits(plan: Plan, measured: Measured) -> str:
    """Average bits, counted again from what the file holds."""
    weights = 8 * plan.size_bytes / plan.average_bits
    return f"{8 * measured.weight_bytes / weights:.3f} bits on average"


def layer_table(plan: Plan) -> str:
    """One line per layer: its scheme and the reason."""
    width = max(len(name) for name in plan.schemes)
    return "\n".join(f"{n:<{width}}  {s!s:<6}  {plan.why.get(n, '')}".rstrip() for n, s in plan.schemes.items())


def explain(plan: Plan, layer: str | None = None) -> str:
    """Why layers got their schemes, all or one, a line per reason; raises InvalidRequest for an unknown layer."""
    if layer is not None and layer not in plan.schemes:
        raise InvalidRequest(f"The plan has no layer {layer!r}.{did_you_mean(layer, list(plan.schemes))}")
    names = list(plan.schemes) if layer is None else [layer]
    return "\n".join(
        "\n  ".join([f"{name}: {plan.schemes[name]}", *plan.why.get(name, "no reason was recorded").split("; ")])
        for name in names
    )
