"""A latency table as a person reads it: what each layer takes in float and on codes, and what conversions cost."""

from __future__ import annotations

from quantkit.plan.latency import LatencyTable


def latency_summary(table: LatencyTable) -> str:
    """A line per layer and operation, and one for all sites together, in microseconds a batch."""
    notes = table.notes
    width = max(map(len, table.operations), default=5)
    lines = [
        f"onnxruntime {notes.get('onnxruntime', '?')} on {notes.get('machine', '?')}, {notes.get('date', '?')}",
        f"{table.threads} thread(s), batch {table.batch}: float {notes.get('float_ms', '?')} ms, all quantized "
        f"{notes.get('quantized_ms', '?')} ms",
        f"{'µs':<{width}} {'float':>10} {'codes':>10} {'full bytes':>10}",
    ]
    for name, time in table.operations.items():
        slower = "  slower on codes" if time.integer_ns > time.float_ns > 0 else ""
        times = [time.float_ns, time.integer_ns, time.wide_ns]
        lines.append(f"{name:<{width}}" + "".join(f" {ns / 1e3:10.1f}" for ns in times) + slower)
    for title, field in (("quantize_ns", "to codes"), ("dequantize_ns", "to float")):
        costs = sorted(getattr(time, title) for time in table.sites.values())
        if costs:
            lines.append(f"conversion of a tensor {field}: {costs[0] / 1e3:.1f} to {costs[-1] / 1e3:.1f} µs")
    return "\n".join(lines)
