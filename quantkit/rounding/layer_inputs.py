"""The inputs of a layer as a matrix: what its weight multiplies, one row per output position (im2col for
convolutions).

Taken from the arguments of the call itself, not from the module's attributes, so that padding a user's class applies
before the convolution is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.program.arguments import leaves_of
from quantkit.program.convolutions import named_arguments, padded_sides, per_axis
from quantkit.program.padding import as_rows

LEAST_POSITIONS = 128


def positions_wanted(inputs: int) -> int:
    """How many output positions of a convolution with so many inputs say enough about them: neighbours are alike."""
    return max(LEAST_POSITIONS, inputs // 2)


@dataclass(frozen=True)
class LayerInputs:
    """What one call of a layer multiplies. ``x`` are rows (1, rows, K), or what a convolution slides over, padded, (N,
    C, positions); ``places`` (output positions, kernel positions) then says where in it each product reads.
    """

    x: Tensor
    places: Tensor | None = None
    groups: int = 1

    @property
    def width(self) -> int:
        """How many inputs an output has: K."""
        if self.places is None:
            return self.x.shape[-1]
        return self.x.shape[1] // self.groups * self.places.shape[1]

    def columns(self, span: slice) -> Tensor:
        """The inputs of a span of all K, as (groups, rows, inputs): of a convolution all samples of one output
        position, then of the next.
        """
        if self.places is None:
            return self.x[..., span]
        kernel = self.places.shape[1]
        first, last = span.start // kernel, -(-span.stop // kernel)
        x = self.x.unflatten(1, (self.groups, -1))[:, :, first:last].flatten(1, 2)
        # samples last: what is picked is then one piece of memory for each place
        picked = x.permute(1, 2, 0).contiguous().index_select(1, self.places.t().reshape(-1).to(x.device))
        found = picked.view(self.groups, -1, len(self.places) * len(x))
        return found[:, span.start - first * kernel : span.stop - first * kernel].transpose(1, 2)


def layer_inputs(
    kind: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    generator: torch.Generator | None = None,
    source: int = 0,
    rows_of: Callable[[Tensor], Tensor] = as_rows,
) -> LayerInputs:
    """The inputs of one layer call: ``kind`` is "linear", "matmul" or "conv1d".."conv3d"; ``args`` and ``kwargs`` are
    those of the torch call, ``source`` the position of what the layer reads among its tensors. With a ``generator``,
    of a convolution with many positions some are drawn, the same for all samples of the call. ``rows_of`` says
    which rows of what other layers read count.
    """
    if not kind.startswith("conv"):
        tensors = [leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)]
        return LayerInputs(rows_of(tensors[source].detach()).unsqueeze(0))
    given = named_arguments(kind, args, kwargs)
    x, kernel = given["input"].detach(), given["weight"].shape[2:]  # a model may take gradients inside its forward
    dims = len(kernel)
    stride, dilation = per_axis(given.get("stride", 1), dims), per_axis(given.get("dilation", 1), dims)
    groups = given.get("groups", 1)
    if x.dim() == dims + 1:
        x = x.unsqueeze(0)  # a convolution also takes one unbatched sample
    sides = padded_sides(given.get("padding", 0), kernel, dilation)
    x = F.pad(x, [p for side in reversed(sides) for p in side])
    places = torch.arange(math.prod(x.shape[2:]), device="cpu").reshape(x.shape[2:])
    for axis in range(dims):
        places = places.unfold(axis, dilation[axis] * (kernel[axis] - 1) + 1, stride[axis])
    every: list[Any] = [slice(None, None, d) for d in dilation]
    places = places[(..., *every)].reshape(-1, math.prod(kernel))
    wanted = positions_wanted(x.shape[1] // groups * math.prod(kernel))
    if generator is not None and len(places) > wanted:
        places = places[torch.randperm(len(places), generator=generator, device="cpu")[:wanted]]
    return LayerInputs(x.flatten(2), places, groups)
