"""Tile sizes of the matmul, by device: measured ones from a table, a rule of thumb where nothing was measured.

The table is a JSON file of the caller's, ``{device: {"kind m n k": [rows, columns, step, split, warps, stages]}}``,
with rows counted in powers of two, so that one measurement serves all batch sizes near it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path

from quantkit.errors import CorruptFile
from quantkit.store import write_atomically


@dataclass(frozen=True)
class Tile:
    """Output rows and columns of a program, inputs of one product, parts of the inputs, and Triton's warps and
    stages.
    """

    rows: int = 16
    columns: int = 64
    step: int = 64
    split: int = 1
    warps: int = 4
    stages: int = 3


def shape_class(kind: str, rows: int, channels: int, inputs: int) -> str:
    """The key of a shape: rows rounded up to a power of two."""
    return f"{kind} {1 << max(0, rows - 1).bit_length()} {channels} {inputs}"


def rule_of_thumb(rows: int, channels: int, inputs: int) -> Tile:
    """Few rows: narrow tiles, and as many parts of the inputs as give about 256 programs. Many rows: large tiles."""
    if rows > 64:
        return Tile(128, 128, 64, 1, 8, 4)
    height = 16 if rows <= 16 else 32 if rows <= 32 else 64
    programs = -(-channels // 64)
    return Tile(height, 64, 64, max(1, min(8, 256 // programs, inputs // 512)))


@dataclass
class TuningTable:
    """What was measured, device name -> shape class -> tile."""

    measured: dict[str, dict[str, Tile]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> TuningTable:
        """The table in a file; empty where there is none yet. Raises CorruptFile for what is no table."""
        if not Path(path).exists():
            return cls()
        try:
            found = json.loads(Path(path).read_text())
            return cls({device: {key: Tile(*t) for key, t in tiles.items()} for device, tiles in found.items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise CorruptFile(f"{str(path)!r} is no table of kernel tiles ({error}). Measure it again.") from error

    def save(self, path: str | Path) -> None:
        rows = {device: {key: astuple(t) for key, t in tiles.items()} for device, tiles in self.measured.items()}
        text = json.dumps(rows, indent=1, sort_keys=True)
        write_atomically(Path(path), lambda temporary: Path(temporary).write_text(text))

    def has(self, device: str, kind: str, rows: int, channels: int, inputs: int) -> bool:
        """True where this shape's class was measured on this device."""
        return shape_class(kind, rows, channels, inputs) in self.measured.get(device, {})

    def tile(self, device: str, kind: str, rows: int, channels: int, inputs: int) -> Tile:
        found = self.measured.get(device, {}).get(shape_class(kind, rows, channels, inputs))
        return found or rule_of_thumb(rows, channels, inputs)

    def tune(self, device: str, kind: str, sizes: tuple[int, int, int], seconds_of: Callable[[Tile], float]) -> Tile:
        """Measure the candidates for one shape (rows, channels, inputs) and keep the fastest; the first of equals."""
        best = min(candidates(*sizes), key=seconds_of)
        self.measured.setdefault(device, {})[shape_class(kind, *sizes)] = best
        return best


def candidates(rows: int, channels: int, inputs: int) -> Iterator[Tile]:
    """Tiles worth measuring for a shape, the rule of thumb first."""
    yield rule_of_thumb(rows, channels, inputs)
    if rows <= 64:
        for columns in (32, 64, 128):
            for split in (1, 2, 4, 8):
                if inputs // split >= 512 or split == 1:
                    yield Tile(16 if rows <= 16 else 64, columns, 64, split, 4, 4)
    else:
        for height, columns, warps in ((64, 128, 4), (128, 128, 8), (128, 256, 8), (64, 256, 8)):
            for stages in (3, 4):
                yield Tile(height, columns, 64, 1, warps, stages)
