"""The matmul kernels behind one function: quantized activations, a launch, an output in the input's type."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from quantkit.errors import InvalidRequest
from quantkit.runtime.int_linear.reference import quantize_rows
from quantkit.runtime.low_bit_matmul.kernel import finish, matmul
from quantkit.runtime.low_bit_matmul.tuning import Tile, TuningTable
from quantkit.runtime.low_bit_matmul.weights import FP8, INT4_FP8, INT8, MatmulWeight
from quantkit.runtime.token_quant.kernel import quantize_rows_fp8

INPUTS = 16  # byte kinds read inputs in multiples of this
_MEASURED = TuningTable()


def low_bit_linear(
    x: Tensor, weight: MatmulWeight, bias: Tensor | None = None, gated: bool = False, tile: Tile | None = None
) -> Tensor:
    """The product of ``x`` (any leading dimensions, float16, bfloat16 or float32, any layout) and a weight; rows are
    quantized as the weight's kind asks. ``gated``: the first half of the channels passes SiLU and multiplies the
    second.

    int8 sums are exact; others are float32 sums in an order of the tile's. ``tile`` overrides the device's table.
    """
    require_shapes(x, weight, bias, gated)
    rows = x.reshape(-1, weight.inputs).contiguous()
    columns = weight.channels // 2 if gated else weight.channels
    out = torch.empty(len(rows), columns, dtype=x.dtype, device=x.device)
    if out.numel():
        device = torch.cuda.get_device_name(x.device) if x.is_cuda else x.device.type
        sizes = (len(rows), weight.channels, weight.inputs)
        tile = tile or _MEASURED.tile(device, weight.kind, *sizes)
        _launch(_activations(rows, weight.kind), weight, bias, out, gated, tile)
    return out.reshape(*x.shape[:-1], columns)


def use_table(table: TuningTable) -> None:
    """Take tiles from this table from now on."""
    _MEASURED.measured = table.measured


def require_shapes(x: Tensor, weight: MatmulWeight, bias: Tensor | None, gated: bool) -> None:
    """Raise InvalidRequest, naming what does not fit, for operands that no kernel takes."""
    if x.shape[-1] != weight.inputs or not x.is_floating_point():
        raise InvalidRequest(
            f"This weight takes floating-point rows of {weight.inputs} inputs, not {x.dtype} of shape "
            f"{tuple(x.shape)}."
        )
    if weight.inputs % (weight.group or INPUTS):
        raise InvalidRequest(f"{weight.inputs} inputs are no multiple of {weight.group or INPUTS}: pad the weight.")
    if gated and weight.channels % 2:
        raise InvalidRequest(f"A gated weight has gates and values, not {weight.channels} channels.")
    if bias is not None and bias.shape != (weight.channels,):
        raise InvalidRequest(f"The bias has shape {tuple(bias.shape)}, the weight {weight.channels} channels.")


def _activations(rows: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    if kind in (INT4_FP8, FP8):
        return quantize_rows_fp8(rows)
    return quantize_rows(rows.float()) if kind == INT8 else (rows, None)


def _launch(
    given: tuple[Tensor, Tensor | None],
    weight: MatmulWeight,
    bias: Tensor | None,
    out: Tensor,
    gated: bool,
    tile: Tile,
) -> None:
    (codes, row_scale), (rows, columns) = given, out.shape
    four_bits, integer = weight.group > 0, weight.kind == INT8
    step = min(tile.step, weight.group // 2) if four_bits else tile.step
    steps = weight.inputs // weight.group if four_bits else triton.cdiv(weight.inputs, step)
    split = min(tile.split, steps)
    wide = codes.dtype == torch.bfloat16 and not codes.is_cuda
    kind = torch.int32 if integer else torch.float32
    partial = torch.empty(split, rows, weight.channels, dtype=kind, device=out.device) if split > 1 else out
    bias = None if bias is None else bias.float().contiguous()
    held = {"row_scale": out if row_scale is None else row_scale, "bias": out if bias is None else bias}
    flags = {"GATED": gated, "SCALED_ROWS": row_scale is not None, "BIASED": bias is not None, "SPLIT": split}
    sizes = {"M": rows, "N": columns, "tensor_scale": weight.tensor_scale}
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns))
    blocks = {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.warps}
    matmul[(*grid, split)](
        a=codes, w=weight.codes, scale=weight.scale, out=out, partial=partial, K=weight.inputs, steps=steps,
        FOUR_BITS=four_bits, FP8=weight.kind == INT4_FP8, WIDE=wide, INTEGER=integer, GROUP=max(weight.group, 1),
        STEP=step, num_stages=tile.stages, **held, **flags, **sizes, **blocks,
    )  # fmt: skip
    if split > 1:
        finish[grid](
            partial=partial, scale=weight.scale, out=out, INTEGER=integer, SCALED_CHANNELS=not four_bits,
            **held, **flags, **sizes, **blocks,
        )  # fmt: skip
