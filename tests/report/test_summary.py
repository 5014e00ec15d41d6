"""The table at the end of a run."""

from __future__ import annotations

from dataclasses import replace

from quantkit.plan import Plan
from quantkit.report.summary import Measured, layer_table, summary

PLAN = replace(
    Plan.of({"stem": "w8a8", "block.conv1": "w3a8", "head": "float"}),
    size_bytes=1_500,
    average_bits=3.0,
    why={"stem": "nothing wider is allowed", "block.conv1": "w4a8 would cost 36 bytes"},
)
MEASURED = Measured(
    float_bytes=20_000,
    quantized_bytes=5_000,
    weight_bytes=1_600,
    latency_ratio=0.4567,
    latency_batch=32,
    metrics={
        "float": 92.08,
        "quantized": 91.7,
        "onnx": 91.69,
        "agreement": 99.9,
        "calibration_damage": 0.00123456789,
        "calibration_agreement": 0.984375,
    },
    minimum_runtime="1.23",
)


def rows_of(text: str) -> dict[str, str]:
    """Label -> value of the table's first part."""
    table, _, _ = text.partition("\n\n")
    pairs = [line.split("  ", 1) for line in table.splitlines()]
    return {label: value.strip() for label, value in pairs}


def test_every_measurement_has_its_row() -> None:
    assert rows_of(summary(PLAN, MEASURED)) == {
        "metric of the float model": "92.08",
        "metric of the quantized model, simulated": "91.7",
        "metric of the ONNX file in onnxruntime": "91.69",
        "same largest output, simulated and onnxruntime (%)": "99.9",
        "damage on the calibration inputs": "0.00123457",
        "same largest output as the float model, calibration inputs": "0.984375",
        "ONNX file, float": "20,000 bytes",
        "ONNX file, quantized": "5,000 bytes (75% smaller)",
        "weights of the layers, planned": "1,500 bytes, 3.000 bits on average",
        "weights of the layers, in the file": "1,600 bytes, 3.200 bits on average",
        "time in onnxruntime, batch 32": "0.46 of float",
        "onnxruntime needed": "1.23 or newer",
    }


def test_what_was_not_measured_has_no_row() -> None:
    rows = rows_of(summary(PLAN, replace(MEASURED, metrics={"calibration_damage": 0.5})))
    assert not [label for label in rows if label.startswith(("metric", "same largest"))]
    assert rows["damage on the calibration inputs"] == "0.5"


def test_a_file_that_grew_says_so() -> None:
    """As that of a tiny network does, whose graph outweighs its weights."""
    rows = rows_of(summary(PLAN, replace(MEASURED, quantized_bytes=25_000)))
    assert rows["ONNX file, quantized"] == "25,000 bytes (25% larger)"


def test_values_stand_in_one_column() -> None:
    table, _, _ = summary(PLAN, MEASURED).partition("\n\n")
    starts = {len(label) + len(rest) - len(rest.lstrip()) for label, rest in _split(table)}
    assert len(starts) == 1


def _split(table: str) -> list[tuple[str, str]]:
    pairs = []
    for line in table.splitlines():
        label, rest = line.split("  ", 1)
        pairs.append((label, "  " + rest))
    return pairs


def test_layers_follow_with_scheme_and_reason() -> None:
    expected = [
        "stem         w8a8    nothing wider is allowed",
        "block.conv1  w3a8    w4a8 would cost 36 bytes",
        "head         float",
    ]
    assert layer_table(PLAN).splitlines() == expected
    assert summary(PLAN, MEASURED).endswith("\n\n" + "\n".join(expected))
