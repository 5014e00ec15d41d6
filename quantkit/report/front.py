"""A Pareto front as a table, a CSV file and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from quantkit.plan import Plan
from quantkit.store import write_atomically

HEAD = ("average bits", "bytes", "predicted damage")
LABELS = 2  # a bit: the first plan of every half bit is labelled


def rows(front: Sequence[Plan]) -> list[tuple[float, int, float]]:
    """(average bits, bytes of everything stored, predicted damage) of each plan."""
    return [(plan.average_bits, plan.total_bytes, float(plan.predicted_damage or 0)) for plan in front]


def front_table(front: Sequence[Plan]) -> str:
    """One line per plan, cheapest first, with what its layers get: how many at each scheme."""
    lines = [f"{HEAD[0]:>12} {HEAD[1]:>12} {HEAD[2]:>17}  layers"]
    for plan, (bits, size, damage) in zip(front, rows(front), strict=True):
        counts: dict[str, int] = {}
        for scheme in map(str, plan.schemes.values()):
            counts[scheme] = counts.get(scheme, 0) + 1
        layers = ", ".join(f"{count} {scheme}" for scheme, count in sorted(counts.items()))
        lines.append(f"{bits:12.3f} {size:12,} {damage:17.4g}  {layers}")
    return "\n".join(lines)


def save_csv(front: Sequence[Plan], path: str | Path) -> Path:
    """Write the figures of the table, one row per plan."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([title.replace(" ", "_") for title in HEAD])
    writer.writerows(rows(front))
    return write_atomically(path, lambda temporary: Path(temporary).write_text(text.getvalue(), encoding="utf-8"))


def save_picture(front: Sequence[Plan], path: str | Path) -> Path:
    """Draw damage (logarithmic) against bytes, a step for every plan and its average bits beside some of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    points = [row for row in rows(front) if row[2] > 0]
    sizes, damages = [size / 1000 for _, size, _ in points], [damage for _, _, damage in points]
    axes.plot(sizes, damages, drawstyle="steps-post", color="#9db4c8", linewidth=1.2, zorder=1)
    axes.scatter(sizes, damages, s=18, color="#1f4e79", zorder=2)
    for k, (bits, _, _) in enumerate(points):
        if k and int(LABELS * bits) == int(LABELS * points[k - 1][0]):
            continue
        axes.annotate(
            f"{bits:.2f} bits", (sizes[k], damages[k]), xytext=(5, 4), textcoords="offset points", fontsize=8
        )
    axes.set(xlabel="size (KB)", ylabel="predicted damage", yscale="log" if points else "linear")
    axes.grid(True, color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
