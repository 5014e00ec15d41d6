"""The rows of the study: what is asked of which network, what it is to reach, and what it reached before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

GROUPS = ("minilm", "llama", "injected", "vit", "rounding", "rotations", "tiny")
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Row:
    """One request. ``budget`` is that of ``quantkit.quantize``; ``linears`` says that it is meant of the linears, and
    that embeddings and head keep their numbers. ``options`` are further arguments; ``figure`` is the score that
    ``goal`` and ``before`` are about. ``file``: the ONNX file is written and counted; ``metered``: memory and time
    are.
    """

    group: str
    name: str
    subject: str
    budget: str
    goal: str
    before: str = ""
    figure: str = "KL"
    linears: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    file: bool = False
    metered: bool = False


def grouped(bits: int, group: int) -> str:
    """Weights in groups with zero points."""
    return f"w{bits}g{group}z"


def mixed(*groups: int) -> dict[str, Any]:
    """Candidates of these group sizes."""
    return {"schemes": tuple(grouped(bits, group) for group in groups for bits in (2, 3, 4, 6, 8))}


def rows() -> Iterator[Row]:
    """Every row of the study but the table of tiny networks."""
    yield from _minilm()
    yield from _llama()
    yield from _cost()
    yield from _injected()
    yield from _vit()
    yield from _rounding()
    yield from _rotations()


def _minilm() -> Iterator[Row]:
    for name, budget, goal, before in (
        ("W4 g32", grouped(4, 32), ">= .993", ".991 (peer .978)"),
        ("W4 g128", grouped(4, 128), ">= .990", ".987 (peer .967)"),
    ):
        yield Row("minilm", f"minilm {name}", "minilm", budget, goal, before, "cosine", linears=True)
    for bits, goal, before in (("3.5", ">= .975", ".968 (peer .859)"), ("3.0", ">= .95", ".932")):
        yield Row(
            "minilm", f"minilm linears {bits}", "minilm", f"{bits} bits", goal, before, "cosine", True, mixed(32, 128)
        )
    for scheme, goal, before, which in (
        ("w8a8", ">= .997", ".862 (peer .9975)", ("",)),
        ("w8a8d", ">= .998", "", ("",)),
        ("w4a8", ">= .985", ".842 (peer .856)", ("", "linears ")),
    ):
        for part in which:
            name = f"minilm {part}{scheme.upper()}"
            yield Row("minilm", name, "minilm", scheme, goal, before, "cosine", linears=bool(part))
    for bits, goal in (
        ("4.5", ">= .985, file <= 14 MB, STS-B >= 86.4"),
        ("4.0", ">= .975, STS-B >= 86.4"),
        ("3.0", ""),
    ):
        yield Row(
            "minilm",
            f"minilm all {bits}",
            "minilm",
            f"{bits} bits",
            goal,
            "",
            "cosine",
            options=mixed(32, 128),
            file=True,
        )


def _llama() -> Iterator[Row]:
    for bits, goal, before in (
        ("4.31", "<= .00018", ".00022 (peer .00043)"),
        ("3.50", "<= .00045", ".00082 (peer .00069)"),
        ("3.00", "<= .00075", ".00207 (peer .00116)"),
        ("2.28", "<= .0045", ".0177 (peer .00722)"),
    ):
        yield Row(
            "llama",
            f"llama linears {bits}",
            "llama",
            f"{bits} bits",
            goal,
            before,
            linears=True,
            options=mixed(64, 128),
        )
    for bits, goal, before in (
        ("5.08", "<= .00036", "refused (peer .00054)"),
        ("4.53", "<= .0008", "refused (peer .00128)"),
        ("4.28", "<= .0017", "refused (peer .0029)"),
        ("3.50", "<= .0040", "refused (peer .0060)"),
        ("2.69", "<= .0125", "refused (peer .0190)"),
    ):
        yield Row("llama", f"llama all {bits}", "llama", f"{bits} bits", goal, before, options=mixed(64, 128))
    for scheme, goal, before, target in (
        ("w8a8", "<= .0006, ratio <= 1.002", "(peers .0036, .0003)", "onnxruntime-cpu"),
        ("w4a8", "ratio <= 1.01", "", "onnxruntime-cpu"),
        ("w4g128sf8afp8d", "ratio <= 1.02", "", "torch"),
    ):
        yield Row(
            "llama",
            f"llama {scheme.upper()}",
            "llama",
            scheme,
            goal,
            before,
            "KL" if scheme == "w8a8" else "ratio",
            options={"target": target},
        )


def _cost() -> Iterator[Row]:
    yield Row(
        "llama",
        "llama W3 memory",
        "llama",
        grouped(3, 64),
        "<= 1000 MB, learning <= 72 passes",
        "8,000 MB, not learned",
        "MB",
        linears=True,
        metered=True,
    )


def _injected() -> Iterator[Row]:
    for how in ("scale", "rotate"):
        for seed in SEEDS:
            name = f"llama {how} {seed}"
            yield Row("injected", f"{name} W4A8", name, "w4a8", "ratio <= 1.03", "42 (plain)", "ratio")


def _vit() -> Iterator[Row]:
    for name, subject, bits, goal, before in (
        ("vit W4A4", "vit", 4, ">= 79.8", "79.06 (float 81.34)"),
        ("vit injected W4A4", "vit injected", 4, ">= 78", "10 (chance)"),
        ("vit W3A3", "vit", 3, "", ""),
    ):
        first = {"rules": {"conv1": f"w{bits}a8"}}  # the pixels themselves are read in 8 bits, as in study_vit.py
        yield Row("vit", name, subject, f"w{bits}a{bits}", goal, before, "top-1", options=first)


def _rounding() -> Iterator[Row]:
    """What rounding by the loss of the whole network does, before anything is learned."""
    for subject, budget, name, figure in (
        *(("llama", grouped(bits, 64), f"W{bits}", "KL") for bits in (4, 3, 2)),
        ("minilm", "w4", "W4 by row", "cosine"),
        ("minilm", grouped(4, 128), "W4 g128", "cosine"),
    ):
        for how in ("gptq", "yaqa"):
            options = {"rounding": how, "transforms": "none", "reconstruction": "none", "correction": None}
            called = f"rounding: {subject} {name} {how}"
            yield Row("rounding", called, subject, budget, "", "", figure, linears=True, options=options)


def _rotations() -> Iterator[Row]:
    """What rotations do, with and without scalings, before anything is learned."""
    scaled, turned = "norm-scaling,layer-scaling,key-scaling", "head-rotation,stream-rotation"
    asked = {
        "plain": "none",
        "scaled": scaled,
        "turned": turned,
        "scaled, turned": f"{scaled},{turned}",
        "auto": "auto",
    }
    both, every = ("plain", "turned"), tuple(asked)
    for subject, budget, linears, hows in (
        ("llama", "w4a8", False, every),
        ("llama scale 1", "w4a8", False, every),
        *((f"llama rotate {seed}", "w4a8", False, every) for seed in SEEDS),
        ("llama", "w4a4", False, both),
        ("llama", "w3g64z", True, both),
        ("llama", "w2g64z", True, both),
        ("vit", "w4a4", False, both),
    ):
        rules = {"rules": {"conv1": "w4a8"}} if subject == "vit" else {}
        figure = "top-1" if subject == "vit" else "KL"
        for how in hows:
            options = {"transforms": asked[how], "reconstruction": "none", "correction": None, **rules}
            name = f"rotations: {subject} {budget.upper()} {how}"
            yield Row("rotations", name, subject, budget, "", "", figure, linears, options)
