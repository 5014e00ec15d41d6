"""What was measured, in lines, as a table and summed up."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

Record = dict[str, Any]
SLOW_REFUSAL_S = 5
HEAD = "| network | quantized | exported | share | kernels | sizes | error | noise | seconds |"
LARGE_ERROR = 0.02


def cells(found: Record) -> list[str]:
    """One cell for each column of the table."""
    seconds = found.get("quantize_seconds", 0.0) + found.get("export_seconds", 0.0)
    kernels = found.get("kernels", {})
    return [
        found["name"],
        "yes" if found.get("quantized") else "no",
        "yes" if found.get("exported") else "no",
        f"{100 * found['share']:.1f} %" if "share" in found else "-",
        str(sum(kernels.values())) if "kernels" in found else "-",
        (", ".join(found["sizes"]) or "none") if "sizes" in found else "-",
        f"{found['error']:.1e}" if "error" in found else "-",
        _noise_of(found),
        f"{seconds:.0f}",
    ]


def _noise_of(found: Record) -> str:
    """How far a network is from itself under another rounding, and the share of its output that depends on it."""
    if "noise" not in found:
        return "-"
    undecided = found.get("undecided", 0.0)
    return f"{found['noise']:.1e}" + (f", {100 * undecided:.0f} % undecided" if undecided else "")


def why(found: Record) -> str:
    """Where and how a network failed; empty where it did not."""
    failed = found.get("failure")
    if not failed:
        return ""
    how = failed["type"] if failed["deliberate"] else f"raw {failed['type']}"
    place = f" ({failed['place']})" if failed.get("place") and not failed["deliberate"] else ""
    return f"{found.get('stage', 'start')}: {how}: {failed['line']}{place}{_beside(found)}"


def _beside(found: Record) -> str:
    """What torch's own exporter does with the float model."""
    plain = found.get("plain")
    if plain is None:
        return ""
    if plain["reached"] == "ran":
        return " [torch.onnx: runs]"
    reached = "is written, does not run" if plain["reached"] == "exported" else "fails too"
    return f" [torch.onnx: {reached}: {plain['failure']['type']}: {plain['failure']['line']}]"


def line_of(found: Record) -> str:
    """A network in one line, or two where it failed."""
    failed = why(found)
    return "  ".join(cells(found)) + (f"\n    {failed}" if failed else "")


def summary(records: Sequence[Record]) -> list[str]:
    """What the whole zoo says."""
    if not records:
        return ["no network"]
    count = len(records)
    quantized = [found for found in records if found.get("quantized")]
    exported = [found for found in records if found.get("exported")]
    shares, errors = ([found[key] for found in records if key in found] for key in ("share", "error"))
    failed = [found for found in records if "failure" in found]
    raw = [found["name"] for found in failed if not found["failure"]["deliberate"]]
    slow = [found["name"] for found in failed if is_slow_refusal(found)]
    lines = [
        f"{count} networks: quantized {len(quantized)} ({100 * len(quantized) / count:.1f} %), exported "
        f"{len(exported)} ({100 * len(exported) / count:.1f} %)"
    ]
    if shares:
        lines.append(f"share at 8 bits or fewer: median {100 * median(shares):.1f} %, least {100 * min(shares):.1f} %")
    if errors:
        lines.append(f"error of the file: median {median(errors):.1e}, worst {max(errors):.1e}")
        large = [found["name"] for found in records if found.get("error", 0.0) > LARGE_ERROR]
        lines.append(f"errors above {100 * LARGE_ERROR:.0f} %: {len(large)}{_listed(large)}")
    lines.append(f"raw errors: {len(raw)}{_listed(raw)}")
    lines.append(f"refusals after more than {SLOW_REFUSAL_S} s: {len(slow)}{_listed(slow)}")
    return lines


def is_slow_refusal(found: Record) -> bool:
    """Whether quantizing was refused on purpose, but late."""
    late = found.get("quantize_seconds", 0.0) > SLOW_REFUSAL_S
    return bool(found["failure"]["deliberate"] and not found.get("quantized") and late)


def _listed(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def markdown(records: Sequence[Record]) -> str:
    """The table, what failed, and the summary."""
    lines = [*(f"- {line}" for line in summary(records)), "", HEAD, "|---" * HEAD.count(" | ") + "|---|"]
    lines += ["| " + " | ".join(cells(found)) + " |" for found in records]
    failed = [found for found in records if "failure" in found]
    if failed:
        lines += ["", "| network | what stopped it |", "|---|---|"]
        lines += [f"| {found['name']} | {why(found).replace('|', chr(92) + '|')} |" for found in failed]
    return "\n".join(lines) + "\n"
