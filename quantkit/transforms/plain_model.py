"""Models that cannot be seen into, or are no float models: refused at the door, by the name of the part."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from quantkit.errors import InvalidRequest
from quantkit.program.layers import layer_kind
from quantkit.program.updates import named_state

# Where torch keeps modules that quantize; stubs and FloatFunctional, which float models have too, are elsewhere.
_QUANTIZING = (
    "torch.ao.quantization.fake_quantize",
    "torch.ao.quantization.observer",
    "torch.ao.nn.qat",
    "torch.ao.nn.quantized.dynamic",
    "torch.ao.nn.quantized.modules.linear",
    "torch.ao.nn.quantized.modules.conv",
)


def require_plain_model(model: nn.Module) -> None:
    """Raise InvalidRequest for a model that is a single layer, compiled in whole or in part, quantized by others, or
    that has tensors without values or without plain memory.
    """
    if layer_kind(model) is not None:
        raise InvalidRequest("The model is a single layer, which has no name: pass torch.nn.Sequential(model).")
    for name, module in model.named_modules():
        part = f"The model's {name}" if name else "The model"
        scripted = isinstance(module, torch.jit.ScriptModule)
        if scripted or hasattr(module, "_orig_mod"):
            raise InvalidRequest(
                f"{part} went through {'torch.jit' if scripted else 'torch.compile'}, which hides its layers. "
                "Pass the model as it was before; the result can be compiled."
            )
        kind = type(module)
        if any(base.__module__.startswith(_QUANTIZING) for base in kind.__mro__):
            raise InvalidRequest(
                f"{part} is a {kind.__module__}.{kind.__name__}, which quantizes or simulates that: two quantizations "
                "would add up. Pass the float model, as it was before prepare or convert."
            )
    _require_plain_tensors(model)


def _require_plain_tensors(model: nn.Module) -> None:
    without = [name for name, p in model.named_parameters() if is_lazy(p) or p.is_meta]
    if without:
        raise InvalidRequest(
            f"These parameters have no values yet: {', '.join(without[:5])}. Run the model on a batch once (lazy "
            "layers) or load its weights (meta device) first."
        )
    for name, tensor in named_state(model).items():
        if tensor.layout is not torch.strided:
            kind = str(tensor.layout).removeprefix("torch.")
            raise InvalidRequest(
                f"The tensor {name!r} of the model has the layout {kind}, and ONNX files and kernels take dense ones. "
                f"Hold it dense ({name}.to_dense()), and multiply by it with matmul."
            )
