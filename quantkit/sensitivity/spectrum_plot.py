"""The plot of a Hessian's spectrum: its bulk and its outliers, density on a logarithmic scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from quantkit.sensitivity.spectrum import Spectrum

FLOOR = 1e-6  # density below this share of the largest is not drawn


def plot_spectrum(spectrum: Spectrum, path: str | Path, title: str = "") -> Path:
    """Draw ``spectrum`` into ``path``, in the format its ending names (png, svg, pdf)."""
    from matplotlib.figure import Figure  # slow to import, and few ask for plots

    low, high = float(spectrum.values.min()), float(spectrum.values.max())
    margin = 0.05 * (high - low) or 1.0
    points = np.linspace(low - margin, high + margin, 2000)
    # wide enough to be seen, however far the outliers lie out
    density = spectrum.density(points, width=(high - low + 2 * margin) / 300)
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.semilogy(points, np.maximum(density, FLOOR * density.max()))
    axes.set_xlabel("eigenvalue of the Hessian of the damage")
    axes.set_ylabel("density")
    axes.set_title(title)
    figure.savefig(path)
    return Path(path)
