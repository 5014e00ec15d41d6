"""Inputs that a model can do without and that make outputs of their own, as labels make a loss."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from quantkit.program.inputs import Batch
from quantkit.program.intercept import change_inputs, tensors_of
from quantkit.program.program import Program


def dispensable_inputs(program: Program, model: nn.Module, batch: Batch) -> dict[str, tuple[str, ...]]:
    """The arguments with a default that reach some outputs and not all, with those outputs, by name. ``batch`` is what
    the program was recorded on.
    """
    numbers, found = iter(program.inputs), {}
    for name, value, optional in _arguments(model, batch):
        values = program.depending_on({next(numbers) for _ in tensors_of(value)})
        reached = [output in values for output in program.outputs]
        if optional and any(reached) and not all(reached):
            found[name] = tuple(out for out, is_own in zip(program.output_names, reached, strict=True) if is_own)
    return found


def _arguments(model: nn.Module, batch: Batch) -> Iterator[tuple[str, Any, bool]]:
    """Name and value of every argument, in the order of a program's inputs, and whether it has a default."""
    args, kwargs = change_inputs(model, *batch, lambda _, tensor: tensor)
    known = inspect.signature(model.forward).parameters
    positional = [*known, *(f"argument {i}" for i in range(len(known), len(args)))]
    for name, value in (*zip(positional, args, strict=False), *kwargs.items()):
        yield name, value, name in known and known[name].default is not inspect.Parameter.empty
