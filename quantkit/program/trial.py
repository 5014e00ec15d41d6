"""A look at what a float model makes of its inputs, before anything is measured on it: it must give the same answer
twice, and the first axis of its inputs must be the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from quantkit.errors import InvalidRequest
from quantkit.program.inputs import Batch, batch_size, first_samples, picked_samples
from quantkit.program.intercept import OpKey, computing, device_of, intercept, own_inputs, tensors_of
from quantkit.program.outputs import named_tensors, results_of
from quantkit.program.record import run_model
from quantkit.program.updates import plain_mode, restored

SAMPLES = 4
SLICE = 1 << 22  # elements that are compared at a time
SAME = 1e-4  # of the largest value: sums on several threads come out in another order
_AXIS = (
    "A batch axis is missing: the model takes these inputs, of {shapes}, for one sample each, and so their first axis "
    "would be counted as samples. Add a batch axis, as by x.unsqueeze(0), or use a DataLoader, which stacks samples."
)


def explained(model: nn.Module, batch: Batch, error: InvalidRequest, double: Sequence[str] = ()) -> InvalidRequest:
    """What to say of a model that rejects a batch: that its samples lack a batch axis where it takes them with one, or
    that its parameters were ``double``, and its code holds on to that. A refusal of our own says all.
    """
    if error.__cause__ is None:
        return error
    if double and isinstance(error.__cause__, RuntimeError):
        return InvalidRequest(
            f"The model has parameters in float64 ({', '.join(double[:3])}), all of it is float32 here, and its "
            f"forward insists on float64. Cast to {double[0]}.dtype there, or take casts out and call .float() on the "
            f"model. {error}"
        )
    if _outputs(model, _with_batch_axis(batch, batch)) is None:
        return error
    return InvalidRequest(_AXIS.format(shapes=_shapes(batch)))


def require_repeatable(model: nn.Module, batch: Batch) -> None:
    """Raise InvalidRequest for a model whose outputs differ when it is called twice on the same inputs, or are not
    numbers: nothing can be compared with them.
    """
    first, second = (run_model(model, batch) for _ in range(2))
    once, again = results_of(first), results_of(second)
    if _same(once, again):
        undefined = [name for name, x in named_tensors(first) if x.is_floating_point() and bool(x.isnan().any())]
        if undefined:
            raise InvalidRequest(
                f"The model returns NaN on calibration inputs, in {', '.join(undefined[:3])}. Does it, in float, with "
                "the weights that it should have? Take what makes NaN out of the model or its inputs."
            )
        return
    found = _first_difference(model, batch)
    where = "" if found is None else f" The first call that differs is {found}."
    raise InvalidRequest(
        f"The model is random in eval mode: the same inputs give other outputs in every call.{where} What is measured "
        "on it would be noise. Let what is random depend on self.training, as F.dropout(x, training=self.training) "
        "does, or draw it once and pass it as an input."
    )


def require_samples_first(model: nn.Module, batch: Batch) -> None:
    """Raise InvalidRequest where the first axis of a batch's tensors is not its samples and what is can be told: the
    whole tensors, where the model also takes several stacked; the items of a list, where the outputs have a row for
    each.
    """
    count = batch_size(batch)
    few = first_samples(batch, SAMPLES)
    wanted = _outputs(model, few)
    if wanted is None:  # it takes no fewer
        few, wanted = batch, _outputs(model, batch)
    if wanted is None or not count:
        return
    size = batch_size(few)
    rows = torch.tensor([1, 0] if count > 1 else [0, 0], device="cpu")
    picked = _outputs(model, picked_samples(few, rows))
    if picked is not None and _same(picked, [_picked(x, size, rows) for x in wanted]):
        return
    if (items := _items_of_list(few)) and all(x.dim() and len(x) == items for x in wanted):
        raise InvalidRequest(
            f"The model takes a list of {items} samples, {_shapes(few)}, as detectors do: quantkit counts samples "
            "along the first axis of tensors. Wrap the model in a module whose forward takes one tensor, samples "
            "first, and calls it with list(images.unbind(0))."
        )
    other = _weaker(few)  # not the same: what looks at all values would not tell one from two
    apart, both = _outputs(model, other), _outputs(model, _with_batch_axis(few, other))
    if apart is None or both is None or len(apart) != len(wanted):
        return
    alike = all(x.shape == y.shape for x, y in zip(wanted, apart, strict=True))
    if alike and _same(both, [torch.stack([x, y]) for x, y in zip(wanted, apart, strict=True)]):
        raise InvalidRequest(_AXIS.format(shapes=_shapes(few)))


def _outputs(model: nn.Module, batch: Batch) -> list[Tensor] | None:
    """The tensors that a model returns; None where it rejects a batch."""
    try:
        return results_of(run_model(model, batch))
    except InvalidRequest:
        return None


def _with_batch_axis(one: Batch, other: Batch) -> Batch:
    """Every tensor of two batches, but for single numbers, one behind the other along a new first axis."""
    return tree_map(lambda x, y: torch.stack([x, y]) if isinstance(x, Tensor) and x.dim() else x, one, other)


def _weaker(batch: Batch) -> Batch:
    """The same with half of what its floating-point tensors hold."""
    return tree_map(lambda v: v / 2 if isinstance(v, Tensor) and v.is_floating_point() else v, batch)


def _picked(output: Tensor, size: int, rows: Tensor) -> Tensor:
    return output[rows.to(output.device)] if output.dim() and len(output) == size else output


def _items_of_list(batch: Batch) -> int:
    """How many tensors there are in the one argument that is a list or tuple of them; 0 where none is."""
    args, kwargs = batch
    lists = [v for v in (*args, *kwargs.values()) if isinstance(v, list | tuple) and v]
    alone = [v for v in lists if all(isinstance(x, Tensor) and x.dim() for x in v)]
    return len(alone[0]) if len(alone) == len(lists) == 1 else 0


def _shapes(batch: Batch) -> str:
    found = dict.fromkeys(str(tuple(t.shape)) for t in tensors_of(batch) if t.dim())
    return "shape " + ", ".join(found)


def _same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return len(found) == len(wanted) and all(
        one.dtype == other.dtype and close(one, other, SAME) for one, other in zip(found, wanted, strict=True)
    )


def close(found: Tensor, wanted: Tensor, share: float) -> bool:
    """Whether two tensors are the same up to a ``share`` of the largest value, compared some elements at a time: they
    may be the logits of a large vocabulary.
    """
    if found.shape != wanted.shape:
        return False
    if not wanted.is_floating_point() or not wanted.numel():
        return torch.equal(found, wanted)
    pairs = list(zip(found.detach().reshape(-1).split(SLICE), wanted.detach().reshape(-1).split(SLICE), strict=True))
    largest = max(float(other.nan_to_num(0, 0, 0).abs().max()) for _, other in pairs)
    return all(torch.allclose(one, other, rtol=0, atol=share * largest, equal_nan=True) for one, other in pairs)


def _first_difference(model: nn.Module, batch: Batch) -> OpKey | None:
    """The first call whose results differ between two runs on the same inputs; None where no call shows it."""
    once, again = _sums(model, batch), _sums(model, batch)
    for (key, one), (other, two) in zip(once, again, strict=False):
        if key != other or any(abs(a - b) > SAME * max(abs(a), abs(b)) for a, b in zip(one, two, strict=False)):
            return key
    return None


def _sums(model: nn.Module, batch: Batch) -> list[tuple[OpKey, list[float]]]:
    """Every call of a run, with the sum of the sizes of the numbers in each tensor that it makes."""
    found: list[tuple[OpKey, list[float]]] = []

    def note(key: OpKey, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        weighted = [x.detach().double().reshape(-1) for x in tensors_of(result) if not x.is_complex()]
        found.append((key, [float(x.nan_to_num(0, 0, 0).abs().sum()) for x in weighted]))
        return result

    args, kwargs = own_inputs(*batch, device_of(model))
    with plain_mode(model), restored(model), computing(model), intercept(model, note):
        model(*args, **kwargs)
    return found
