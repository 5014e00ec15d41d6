"""A front as people read it: a table, a CSV file with the same figures, a picture."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from quantkit.formats import Scheme
from quantkit.plan import Plan
from quantkit.report.front import front_table, save_csv, save_picture


def plan(bits: int, damage: float) -> Plan:
    schemes = {"stem": Scheme.parse("w8a8"), "body": Scheme.parse(f"w{bits}a8"), "head": Scheme.parse(f"w{bits}a8")}
    return Plan(
        schemes, size_bytes=1000 * bits, total_bytes=1000 * bits + 72, average_bits=bits, predicted_damage=damage
    )


FRONT = (plan(2, 0.5), plan(4, 0.01), plan(6, 0.0))


def test_table_counts_the_layers_of_each_scheme() -> None:
    head, *lines = front_table(FRONT).splitlines()
    assert head.split() == ["average", "bits", "bytes", "predicted", "damage", "layers"]
    assert lines[0].split() == ["2.000", "2,072", "0.5", "2", "w2a8,", "1", "w8a8"]
    assert len({len(line.rpartition("  ")[0]) for line in lines}) == 1


def test_csv_holds_the_exact_figures(tmp_path: Path) -> None:
    found = list(csv.DictReader(save_csv(FRONT, tmp_path / "front.csv").open()))
    assert [float(row["predicted_damage"]) for row in found] == [0.5, 0.01, 0.0]
    assert [int(row["bytes"]) for row in found] == [2072, 4072, 6072]


@pytest.mark.parametrize("front", [FRONT, FRONT[-1:], FRONT * 20])
def test_picture_is_a_png(front: tuple[Plan, ...], tmp_path: Path) -> None:
    data = save_picture(front, tmp_path / "front.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert list(tmp_path.iterdir()) == [tmp_path / "front.png"]


def test_measured_damage_stands_beside_the_predicted(tmp_path: Path) -> None:
    measured = [0.75, 0.0125, 0.0]
    head, *lines = front_table(FRONT, measured).splitlines()
    assert head.split() == ["average", "bits", "bytes", "predicted", "damage", "measured", "damage", "layers"]
    assert [float(line.split()[3]) for line in lines] == measured
    assert len({len(line.rpartition("  ")[0]) for line in lines}) == 1
    found = list(csv.DictReader(save_csv(FRONT, tmp_path / "front.csv", measured).open()))
    assert [float(row["measured_damage"]) for row in found] == measured
    plain = save_picture(FRONT, tmp_path / "plain.png").read_bytes()
    assert save_picture(FRONT, tmp_path / "rings.png", measured).read_bytes() != plain
