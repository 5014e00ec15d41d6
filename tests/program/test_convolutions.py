"""Arguments of convolutions by position and by name."""

from __future__ import annotations

import pytest

from quantkit.program.convolutions import named_arguments, padded_sides, per_axis


@pytest.mark.parametrize(
    ("op", "args", "names"),
    [
        ("conv2d", "xwb1023", {"stride": "1", "padding": "0", "dilation": "2", "groups": "3"}),
        ("conv_transpose2d", "xwb10234", {"output_padding": "2", "groups": "3", "dilation": "4"}),
    ],
)
def test_arguments_by_position(op: str, args: str, names: dict[str, str]) -> None:
    found = named_arguments(op, args, {})
    assert {name: found[name] for name in names} == names
    assert named_arguments(op, args[:3], {"groups": "9"})["groups"] == "9"


def test_options_for_each_axis() -> None:
    assert per_axis(2, 3) == (2, 2, 2)
    assert per_axis((3,), 2) == (3, 3)
    assert per_axis((1, 2), 2) == (1, 2)
    assert padded_sides("same", (4, 3), (1, 2)) == [(1, 2), (2, 2)]
    assert padded_sides("valid", (4, 3), (1, 2)) == [(0, 0), (0, 0)]
    assert padded_sides((1, 0), (4, 3), (1, 2)) == [(1, 1), (0, 0)]
