"""A Pareto front as a table, a CSV file and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.plan import Plan
from quantkit.store import write_atomically

HEAD = ("average bits", "bytes", "predicted damage", "measured damage")
LABELS = 2  # a bit: the first plan of every half bit is labelled
Measured = Sequence[float] | None


def rows(front: Sequence[Plan], measured: Measured = None) -> list[tuple[float, ...]]:
    """(average bits, bytes of everything stored, predicted damage, and measured where it was) of each plan."""
    table: list[tuple[float, ...]] = [
        (plan.average_bits, plan.total_bytes, float(plan.predicted_damage or 0)) for plan in front
    ]
    return table if measured is None else [(*row, one) for row, one in zip(table, measured, strict=True)]


def front_table(front: Sequence[Plan], measured: Measured = None) -> str:
    """One line per plan, cheapest first, with what its layers get: how many at each scheme."""
    titles = HEAD if measured is not None else HEAD[:3]
    lines = ["".join(f"{title:>{max(12, len(title))}} " for title in titles) + " layers"]
    for plan, (bits, size, *damages) in zip(front, rows(front, measured), strict=True):
        counts: dict[str, int] = {}
        for scheme in map(str, plan.schemes.values()):
            counts[scheme] = counts.get(scheme, 0) + 1
        layers = ", ".join(f"{count} {scheme}" for scheme, count in sorted(counts.items()))
        lines.append(f"{bits:12.3f} {size:12,} " + "".join(f"{damage:16.4g} " for damage in damages) + f" {layers}")
    return "\n".join(lines)


def save_csv(front: Sequence[Plan], path: str | Path, measured: Measured = None) -> Path:
    """Write the figures of the table, one row per plan."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    table = rows(front, measured)
    writer.writerow([title.replace(" ", "_") for title in HEAD[: len(table[0]) if table else len(HEAD)]])
    writer.writerows(table)
    return write_atomically(path, lambda temporary: Path(temporary).write_text(text.getvalue(), encoding="utf-8"))


def save_picture(front: Sequence[Plan], path: str | Path, measured: Measured = None) -> Path:
    """Draw damage (logarithmic) against bytes: a step for every plan as predicted, its average bits beside some of
    them, and a ring where it was measured.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    points = [row for row in rows(front, measured) if row[2] > 0]
    sizes, damages = [row[1] / 1000 for row in points], [row[2] for row in points]
    axes.plot(sizes, damages, drawstyle="steps-post", color="#9db4c8", linewidth=1.2, zorder=1)
    axes.scatter(sizes, damages, s=18, color="#1f4e79", zorder=2, label="predicted")
    if measured is not None and points:
        rings: dict[str, Any] = {"facecolors": "none", "edgecolors": "#c1440e", "linewidths": 1.2}
        axes.scatter(sizes, [row[3] for row in points], s=30, zorder=3, label="measured", **rings)
        axes.legend(frameon=False)
    for k, row in enumerate(points):
        if k and int(LABELS * row[0]) == int(LABELS * points[k - 1][0]):
            continue
        axes.annotate(
            f"{row[0]:.2f} bits", (sizes[k], damages[k]), xytext=(5, 4), textcoords="offset points", fontsize=8
        )
    title = "damage" if measured is not None else "predicted damage"
    axes.set(xlabel="size (KB)", ylabel=title, yscale="log" if points else "linear")
    axes.grid(True, color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
