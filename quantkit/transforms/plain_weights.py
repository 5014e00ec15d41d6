"""Weights that a module computes before every call (weight and spectral normalization, pruning) made plain parameters.

Quantization rounds the weight that is multiplied; computing that weight anew from others would undo it.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)


def make_weights_plain(model: nn.Module) -> None:
    """Replace the parametrizations of a model in eval mode, and the hooks of ``torch.nn.utils`` that came before
    parametrizations, by the values they compute, which are float32.
    """
    for module in list(model.modules()):
        hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _HOOKS)]
        if hooks or parametrize.is_parametrized(module):
            module.float()
        if parametrize.is_parametrized(module):
            _remove_parametrizations(module)
        for hook in hooks:
            if isinstance(hook, WeightNorm):
                nn.utils.remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                nn.utils.remove_spectral_norm(module, hook.name)
            else:
                prune.remove(module, hook._tensor_name)


def _remove_parametrizations(module: nn.Module) -> None:
    """As ``parametrize.remove_parametrizations``, which takes the property off the class that copies share."""
    computed = dict(module.named_children())["parametrizations"]
    values = {name: getattr(module, name).detach() for name, _ in computed.named_children()}
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def copy_with_computed_tensors(model: nn.Module) -> nn.Module:
    """A deep copy, also of modules that keep a tensor with a gradient history, which Python alone refuses to copy."""
    attributes = (value for module in model.modules() for value in vars(module).values())
    computed = {id(v): v.detach().clone() for v in attributes if isinstance(v, Tensor) and not v.is_leaf}
    return copy.deepcopy(model, computed)
