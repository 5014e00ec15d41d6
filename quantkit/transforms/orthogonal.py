"""Orthogonal matrices that spread what stands in one channel over all: Hadamard matrices with random signs (QuaRot,
Ashkboos et al., arXiv 2404.00456; SpinQuant, Liu et al., arXiv 2405.16406).

Hadamard matrices are Sylvester's product of one of order 2 with itself, times one of Paley's two constructions from
the squares modulo a prime (Paley, "On orthogonal matrices", 1933). All are float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def random_hadamard(width: int, generator: torch.Generator) -> Tensor:
    """A Hadamard matrix of norm 1 whose rows have random signs. Where none is known for a width, the product of one of
    a power of two and a random orthogonal matrix.
    """
    signs = torch.randint(0, 2, (width,), generator=generator, device="cpu").double() * 2 - 1
    matrix = hadamard(width)
    if matrix is None:
        odd = width // (width & -width)
        matrix = torch.kron(_sylvester(width // odd), random_orthogonal(odd, generator) * math.sqrt(odd))
    return signs[:, None] * matrix / math.sqrt(width)


def random_orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """A matrix of the uniform distribution over orthogonal ones (Mezzadri, arXiv math-ph/0609050)."""
    drawn = torch.randn(width, width, generator=generator, dtype=torch.float64, device="cpu")
    found, triangle = torch.linalg.qr(drawn)
    signs: Tensor = triangle.diagonal().sign()
    return (found * signs).contiguous()


def keeping_ones(matrix: Tensor) -> Tensor:
    """An orthogonal matrix made one that leaves a vector of equal numbers as it is, from either side: what it makes of
    that vector is reflected back.
    """
    ones = torch.full((len(matrix),), 1 / math.sqrt(len(matrix)), dtype=matrix.dtype, device=matrix.device)
    apart = matrix @ ones - ones
    if float(apart.norm()) < 1e-9:
        return matrix
    return matrix - 2 * torch.outer(apart, apart @ matrix) / apart.square().sum()


def hadamard(width: int) -> Tensor | None:
    """A matrix of ones and minus ones with orthogonal rows; None for a width that no construction here reaches."""
    factor = width & -width
    while factor:
        if (paley := _paley(width // factor)) is not None:
            return torch.kron(_sylvester(factor), paley)
        factor //= 2
    return None


def _sylvester(width: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(matrix) < width:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu"), matrix)
    return matrix


def _paley(width: int) -> Tensor | None:
    """Of order 1, of order q + 1 for a prime q = 3 modulo 4, or of order 2 (q + 1) for a prime q = 1 modulo 4."""
    if width == 1:
        return torch.ones(1, 1, dtype=torch.float64, device="cpu")
    if width % 4:
        return None
    if _is_prime(width - 1):
        return torch.eye(width, dtype=torch.float64, device="cpu") + _bordered(width - 1, -1.0)
    if (width // 2 - 1) % 4 == 1 and _is_prime(width // 2 - 1):
        symmetric = _bordered(width // 2 - 1, 1.0)
        first = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
        second = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64, device="cpu")
        return torch.kron(symmetric, first) + torch.kron(
            torch.eye(width // 2, dtype=torch.float64, device="cpu"), second
        )
    return None


def _bordered(prime: int, below: float) -> Tensor:
    """Whether differences modulo a prime are squares, 1, or not, -1; with a first row of ones and a first column of
    ``below``.
    """
    numbers = torch.arange(prime, device="cpu")
    square = torch.full((prime,), -1.0, dtype=torch.float64, device="cpu")
    square[numbers.square() % prime] = 1.0
    square[0] = 0.0
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64, device="cpu")
    matrix[0, 1:], matrix[1:, 0] = 1.0, below
    matrix[1:, 1:] = square[(numbers[:, None] - numbers[None, :]) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
