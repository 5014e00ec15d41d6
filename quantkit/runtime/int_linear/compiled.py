"""The compiled kernels behind ctypes: a plain C interface, no Python in the library.

They are an optional part of the installation (``setup.py``). Where they were not built, or the CPU has neither AVX2
nor AVX512-VNNI, ``instruction_set`` is None, a notice says so once, and callers take another way.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.progress import notice
from quantkit.runtime.int_linear.panels import Panels
from quantkit.runtime.int_linear.reference import Rows, require_operands

AVX2, VNNI = 1, 2
NAMES = {AVX2: "AVX2", VNNI: "AVX512-VNNI"}
_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "quantkit_supports": [_INT],
    "quantkit_int_linear": [_POINTER] * 7 + [_SIZE] * 4 + [_INT] * 3,
    "quantkit_dynamic_linear": [_POINTER, _POINTER, _POINTER, _SIZE, _INT],
    "quantkit_quantize_rows": [_POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _INT],
    "quantkit_quantize_padded": [_POINTER, *[_SIZE] * 4, _POINTER, _FLOAT, _INT, _INT, _POINTER, _INT],
    "quantkit_windows": [_POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _INT],
}


def open_library(path: Path) -> ctypes.CDLL:
    """A library built from the sources beside this file."""
    library = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = ctypes.c_int if "quantize" not in name and "windows" not in name else None
    return library


@cache
def library() -> ctypes.CDLL | None:
    """The installed kernels, None where they were not built."""
    folder = Path(__file__).parent
    found = next((p for s in EXTENSION_SUFFIXES if (p := folder / f"_compiled{s}").is_file()), None)
    if found is not None:
        return open_library(found)
    notice(
        "The compiled integer kernels are not installed: no C++ compiler was found, or it failed. "
        "Integers run through torch, slower. Install a compiler and quantkit again."
    )
    return None


@cache
def instruction_set() -> int | None:
    """The best instruction set that kernels were built for and this CPU has; None where there is none."""
    built = library()
    if built is None:
        return None
    best = next((i for i in (VNNI, AVX2) if built.quantkit_supports(i)), None)
    if best is None:
        notice("This CPU has neither AVX512-VNNI nor AVX2: integers run through torch, slower.")
    return best


def _built() -> ctypes.CDLL:
    built = library()
    if built is None:
        raise QuantkitError("The compiled kernels are not installed; ask instruction_set() before calling them.")
    return built


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def int_linear_compiled(
    given: Rows,
    weight: Panels,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    through: int | None = None,
    built: ctypes.CDLL | None = None,
) -> Tensor:
    """``int_linear_torch`` on panels, bit for bit, on torch's number of threads.

    Rows may be longer than the weight's inputs by its padding. ``through`` names the instruction set, ``built``
    another library. The output has the padded channels.
    """
    activations, activation_scale = given
    require_operands(activations, weight.padded_inputs, weight.groups, offset)
    rows, channels = len(activations), weight.padded_channels
    out = torch.empty(rows, channels, dtype=torch.float32, device="cpu")
    if out.numel() == 0:
        return out
    activations, scales = activations.contiguous(), activation_scale.float().contiguous()
    failed = (built or _built()).quantkit_int_linear(
        activations.data_ptr(),
        scales.data_ptr(),
        weight.codes.data_ptr(),
        weight.scale.data_ptr(),
        _address(offset),
        _address(bias),
        out.data_ptr(),
        rows,
        channels,
        weight.padded_inputs,
        weight.padded_inputs // weight.groups,
        weight.bits,
        through or instruction_set() or 0,
        torch.get_num_threads(),
    )
    if failed:
        raise QuantkitError("This CPU does not run the instruction set asked for; ask instruction_set() first.")
    return out


class _Layer(ctypes.Structure):
    """``quantkit_layer`` of the C interface."""

    _fields_ = (
        ("weights", _POINTER),
        ("scale", _POINTER),
        ("bias", _POINTER),
        ("channels", _SIZE),
        ("inputs", _SIZE),
        ("group", _SIZE),
        ("bits", _INT),
        ("instruction_set", _INT),
    )


class DynamicLinear:
    """``int_linear_compiled`` of ``quantize_rows_compiled(x)`` in one call, its weight and bias set up beforehand.

    It keeps addresses, so it holds the tensors, and cannot be copied: whoever copies the tensors makes a new one.
    """

    def __init__(self, weight: Panels, bias: Tensor | None) -> None:
        self.tensors = (weight.codes, weight.scale, bias)
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in self.tensors)
        self.channels, self.inputs = weight.padded_channels, weight.padded_inputs
        sizes = (self.channels, self.inputs, self.inputs // weight.groups, weight.bits, instruction_set() or 0)
        self.layer = _Layer(*addresses, *sizes)
        self.address = ctypes.addressof(self.layer)
        self.run = _built().quantkit_dynamic_linear

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` is contiguous float32 of any leading dimensions and the weight's inputs."""
        rows = x.numel() // self.inputs
        out = x.new_empty((*x.shape[:-1], self.channels))
        if self.run(self.address, x.data_ptr(), out.data_ptr(), rows, torch.get_num_threads()):
            raise QuantkitError("This CPU does not run the compiled kernels; ask instruction_set() first.")
        return out


def quantize_rows_compiled(x: Tensor) -> Rows:
    """``quantize_rows`` in one pass over contiguous float32 rows."""
    codes, scale = torch.empty(x.shape, dtype=torch.int8, device="cpu"), torch.empty(x.shape[0], device="cpu")
    _built().quantkit_quantize_rows(
        x.data_ptr(), x.shape[0], x.shape[1], codes.data_ptr(), scale.data_ptr(), torch.get_num_threads()
    )
    return Rows(codes, scale)


def quantize_padded_compiled(
    x: Tensor, pad: tuple[int, int, int, int], scale: float, zero_point: int, high: int
) -> Tensor:
    """int8 codes (unsigned less 128) of a contiguous float32 (images, height, width, channels) tensor inside a border
    of zeros, ``pad`` = top, bottom, left, right.
    """
    images, height, width, channels = x.shape
    codes = torch.empty(
        images, height + pad[0] + pad[1], width + pad[2] + pad[3], channels, dtype=torch.int8, device="cpu"
    )
    sizes = (_SIZE * 4)(*pad)
    _built().quantkit_quantize_padded(
        x.data_ptr(), *x.shape, sizes, scale, zero_point, high, codes.data_ptr(), torch.get_num_threads()
    )
    return codes


def windows_compiled(
    codes: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], inputs: int
) -> tuple[Tensor, tuple[int, int]]:
    """((images * out height * out width, ``inputs``) int8 rows, (out height, out width)) of padded codes: windows in
    the order kernel row, kernel column, channel, filled up with zeros.
    """
    images, tall, wide, channels = codes.shape
    height = (tall - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    width = (wide - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    rows = torch.empty(images * height * width, inputs, dtype=torch.int8, device="cpu")
    shape = (_SIZE * 11)(tall, wide, channels, height, width, *kernel, *stride, *dilation)
    _built().quantkit_windows(codes.data_ptr(), images, shape, inputs, rows.data_ptr(), torch.get_num_threads())
    return rows, (height, width)
