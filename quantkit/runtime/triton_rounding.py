"""Rounding float32 to narrower types inside Triton kernels, as torch and the hardware do, in integer operations.

Triton's interpreter casts wrongly: to FP8 it drops carries, saturation and subnormals, to bfloat16 it cuts off. A
plain cast could not be tested without a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)
SMALLEST_NORMAL = tl.constexpr(0.015625)


@triton.jit
def to_e4m3(x):
    """float32 -> float8e4nv: half to even, saturating at 448.

    Adding 1.5 * 2^(e + 20) to a magnitude below 2^(e + 1) leaves the three mantissa bits that the format has; below
    2^-6, where it is subnormal, e stays -6.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), LARGEST)
    exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
    coarse = (exponent + (20 << 23)).to(tl.float32, bitcast=True) * 1.5
    rounded = (magnitude + coarse) - coarse
    normal = (rounded.to(tl.int32, bitcast=True) >> 20) - (120 << 3)
    code = tl.where(rounded < SMALLEST_NORMAL, (rounded * 512.0).to(tl.int32), normal)
    return (((bits >> 24) & 0x80) | code).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def to_bfloat16(x):
    """float32 -> bfloat16, half to even."""
    bits = x.to(tl.int32, bitcast=True)
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, upper, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def as_type(x, type: tl.constexpr):
    """float32 in float32, float16 or bfloat16."""
    if type == tl.bfloat16:
        return to_bfloat16(x)
    else:
        return x.to(type)
