"""Layers: the modules that own a weight to quantize."""

from __future__ import annotations

from torch import Tensor, nn

QUANTIZABLE: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Embedding: "embedding",
}


def layer_kind(module: nn.Module) -> str | None:
    """The kind of a module that owns a weight to quantize, e.g. "conv2d"; None for all others, also where the weight
    is complex, computed from other tensors or handed in.
    """
    kind = next((name for known, name in QUANTIZABLE.items() if isinstance(module, known)), None)
    weight = module._parameters.get("weight") if kind is not None else None
    return kind if weight is not None and weight.is_floating_point() else None


def weight_of(model: nn.Module, layer: str) -> nn.Parameter:
    """The weight of a layer, output channels first."""
    return model.get_parameter(f"{layer}.weight" if layer else "weight")


def bias_of(model: nn.Module, layer: str) -> Tensor | None:
    """The bias of a layer; None where it has none."""
    bias = getattr(model.get_submodule(layer), "bias", None)
    return bias if isinstance(bias, Tensor) else None


def groups_of(model: nn.Module, layer: str) -> int:
    """The groups of a convolution; 1 for other layers."""
    return int(getattr(model.get_submodule(layer), "groups", 1))
