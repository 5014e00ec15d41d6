"""What torch calls that are no layers make of factors on channels: one rule for all that treat labels alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quantkit.program.codes import moves_values
from quantkit.program.intercept import CALL_ERRORS, tensors_of
from quantkit.program.program import Step
from quantkit.transforms.channel_labels import Labels, ones
from quantkit.transforms.norms import CASTS

Rule = Callable[[Labels, Step, Mapping[int, Tensor]], list[Tensor] | None]


def made_by(labels: Labels, step: Step, known: Mapping[int, Tensor]) -> list[Tensor] | None:
    """The labels of what a call makes, in the order of ``step.makes``; None where the factors of what it reads have to
    be one. ``known`` are values that no input changes.
    """
    rule = _RULES.get(step.key.op)
    if rule is None or not step.makes:
        return None
    try:
        return rule(labels, step, known)
    except CALL_ERRORS:  # arguments that the rule does not take
        return None


def _moved(labels: Labels, step: Step, known: Mapping[int, Tensor]) -> list[Tensor] | None:
    """Labels are moved as the elements are."""
    values = {}
    for number in step.inputs:
        if number in labels.program.floating:
            values[number] = labels.of(number)
        elif number in known:
            values[number] = known[number].cpu()
        else:
            return None
    try:
        args, kwargs = step.called(values, labels.program.shape)
        return tensors_of(step.func(*args, **kwargs))
    except RuntimeError:  # ``view`` takes no tensor that was expanded
        args, kwargs = step.called({n: x.contiguous() for n, x in values.items()}, labels.program.shape)
        return tensors_of(step.func(*args, **kwargs))


def _kept(labels: Labels, step: Step, known: Mapping[int, Tensor]) -> list[Tensor]:
    """A positive factor passes what is homogeneous; what is set to zero has any factor."""
    return [labels.of(step.inputs[0]).expand(labels.program.shape[step.makes[0]])]


def _filled(labels: Labels, step: Step, known: Mapping[int, Tensor]) -> list[Tensor] | None:
    return _kept(labels, step, known) if 0 in step.arguments else None


def _padded(labels: Labels, step: Step, known: Mapping[int, Tensor]) -> list[Tensor] | None:
    """Zeros are added along axes on which factors do not depend."""
    if not moves_values(step):
        return None
    found, shape = labels.of(step.inputs[0]), labels.program.shape[step.makes[0]]
    for axis, size in enumerate(shape):
        if found.shape[axis] != size:
            first = found.narrow(axis, 0, 1)
            labels.equate(found, first, f"{step.key} adds to it")
            found = first
    return [found.expand(shape)]


def _product(labels: Labels, step: Step, known: Mapping[int, Tensor]) -> list[Tensor] | None:
    """A product has the factors of one operand; where both have some, those of the second are one."""
    shape = labels.program.shape[step.makes[0]]
    one, *others = step.inputs
    if not others:
        return [labels.of(one).expand(shape)]
    if one == others[0]:
        return None
    sign = -1 if step.key.op == "div" else 1
    if one not in labels.held:
        return [sign * labels.of(others[0]).expand(shape)]
    labels.make_one(others[0], f"{step.key} multiplies it into what has factors of its own")
    return [labels.of(one).expand(shape)]


def _sum(labels: Labels, step: Step, known: Mapping[int, Tensor]) -> list[Tensor] | None:
    """Operands of a sum have the same factors."""
    if len(step.inputs) != 2:
        return None
    shape = labels.program.shape[step.makes[0]]
    one, other = (labels.of(number).expand(shape) for number in step.inputs)
    labels.equate(one, other, f"{step.key} adds it to something else")
    return [one]


def _chosen(labels: Labels, step: Step, known: Mapping[int, Tensor]) -> list[Tensor] | None:
    """Either of two operands may be taken."""
    shape = labels.program.shape[step.makes[0]]
    floating = [labels.of(n).expand(shape) for n in step.inputs[1:] if n in labels.program.floating]
    if len(floating) == 1 and 0 in step.arguments:
        return floating
    if len(floating) != 2:
        return None
    labels.equate(floating[0], floating[1], f"{step.key} chooses between it and something else")
    return floating[:1]


def _matrices(labels: Labels, step: Step, known: Mapping[int, Tensor]) -> list[Tensor] | None:
    """Factors along what is summed are inverse to each other, and one where only one operand has some."""
    if len(step.inputs) != 2:
        return None
    one, other = (labels.of(number) for number in step.inputs)
    if one.dim() < 2 or other.dim() < 2:
        return None
    shape, why = labels.program.shape[step.makes[0]], f"{step.key} sums over it"
    first, second = (number in labels.held for number in step.inputs)
    if first and second:
        labels.equate(one, one[..., :1, :], why)
        labels.equate(other, other[..., :, :1], why)
        labels.equate(one[..., 0, :], -other[..., :, 0], why)
        return [ones(shape)]
    if first:
        labels.equate(one, one[..., :, :1], why)
        return [one[..., :, :1].expand(shape)]
    labels.equate(other, other[..., :1, :], why)
    return [other[..., :1, :].expand(shape)]


def _spatial(labels: Labels, step: Step, known: Mapping[int, Tensor]) -> list[Tensor] | None:
    """What works on each channel of an image, a signal or a volume alone."""
    shape, read = labels.program.shape[step.makes[0]], labels.of(step.inputs[0])
    if read.dim() < 3:
        return None
    flat = read.flatten(2)
    labels.equate(flat, flat[..., :1], f"{step.key} mixes it")
    return [flat[..., 0].reshape(*read.shape[:2], *[1] * (len(shape) - 2)).expand(shape)]


def _reduced(labels: Labels, step: Step, known: Mapping[int, Tensor]) -> list[Tensor] | None:
    """A sum or a mean of elements with one factor."""
    args, kwargs = step.called({n: labels.of(n) for n in step.inputs}, labels.program.shape)
    most, least = torch.amax(*args, **kwargs), torch.amin(*args, **kwargs)
    return [most] if torch.equal(most, least) else None


_GROUPS: dict[Rule, str] = {
    _moved: "reshape reshape_as view view_as flatten unflatten squeeze unsqueeze permute transpose t T mT swapaxes "
    "movedim getitem select narrow chunk split unbind expand expand_as repeat repeat_interleave tile broadcast_to "
    "roll flip index_select cat stack pixel_shuffle channel_shuffle",
    _kept: " ".join(sorted(CASTS)) + " relu leaky_relu prelu abs neg dropout dropout1d dropout2d dropout3d",
    _filled: "masked_fill",
    _padded: "pad",
    _product: "mul div",
    _sum: "add sub",
    _chosen: "where",
    _matrices: "matmul bmm mm",
    _spatial: "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d interpolate",
    _reduced: "mean sum amax amin",
}
_RULES: dict[str, Rule] = {name: rule for rule, names in _GROUPS.items() for name in names.split()}
