"""Hadamard matrices, by their definition, and what is made of them."""

from __future__ import annotations

import pytest
import torch

from quantkit.transforms.orthogonal import hadamard, keeping_ones, random_hadamard, random_orthogonal

REACHED = (1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 48, 60, 76, 96, 128, 192, 384, 640, 768)


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("width", REACHED)
def test_rows_of_ones_are_orthogonal(width: int) -> None:
    matrix = hadamard(width)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones(width, width, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, width * torch.eye(width, dtype=torch.float64))


@pytest.mark.parametrize("width", [3, 6, 18, 92])
def test_widths_without_a_construction_are_told(width: int) -> None:
    assert hadamard(width) is None


@pytest.mark.parametrize("width", [1, 3, 6, 12, 18, 40, 128])
def test_random_ones_are_orthogonal_and_follow_the_seed(width: int) -> None:
    identity = torch.eye(width, dtype=torch.float64)
    for make in (random_hadamard, random_orthogonal):
        matrix = make(width, drawn())
        torch.testing.assert_close(matrix @ matrix.T, identity, rtol=0, atol=1e-12)
        assert torch.equal(matrix, make(width, drawn()))
    assert width < 12 or not torch.equal(random_hadamard(width, drawn(0)), random_hadamard(width, drawn(1)))


def test_one_channel_is_spread_evenly_over_all() -> None:
    for width in (48, 128):
        spread = random_hadamard(width, drawn())[5]
        torch.testing.assert_close(spread.abs(), torch.full((width,), width**-0.5, dtype=torch.float64))
    assert float(random_hadamard(18, drawn())[5].abs().max()) < 0.8  # of a power of two and a random matrix


@pytest.mark.parametrize("width", [1, 2, 6, 12, 48, 128])
def test_ones_stay_on_either_side(width: int) -> None:
    matrix, ones = keeping_ones(random_hadamard(width, drawn(3))), torch.ones(width, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix @ ones, ones, rtol=0, atol=1e-12)
    torch.testing.assert_close(ones @ matrix, ones, rtol=0, atol=1e-12)
    assert width < 12 or float(matrix.abs().max()) < 5 * width**-0.5  # still spread


def test_a_matrix_that_keeps_ones_is_left_as_it_is() -> None:
    swap = torch.eye(4, dtype=torch.float64)[[1, 0, 3, 2]]
    assert torch.equal(keeping_ones(swap), swap)
