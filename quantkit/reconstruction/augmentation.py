"""Images as the network could also have seen them: mirrored and shifted, where it hardly minds.

Learning after rounding has a few hundred samples for some hundred thousand codes, and learns them by heart. Networks
for images are mostly trained on mirrored and shifted copies of their images; whether this one was, it says itself: a
change is taken where it moves the float outputs far less than another sample would. What is learned are the float
outputs for the changed inputs, so they need not stay the same, but inputs that mean nothing to the network would
teach little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_flatten, tree_map

from quantkit.program.inputs import Batch

T = TypeVar("T")
LEAST_SIDE = 8  # pixels: what is smaller is no image
SHIFT = 8  # images move by up to one part in so many of their height and width
HARMLESS = 0.1  # of the damage of another sample's output


def mirrored(images: Tensor, draw: torch.Generator) -> Tensor:
    """Images (samples, channels, height, width), about half of them with left and right exchanged."""
    chosen = torch.rand(len(images), generator=draw, dtype=torch.float32, device="cpu") < 0.5
    found = images.clone()
    found[chosen] = images[chosen].flip(-1)
    return found


def shifted(images: Tensor, draw: torch.Generator) -> Tensor:
    """Images (samples, channels, height, width), each moved up or down and left or right; edges are reflected."""
    height, width = images.shape[-2:]
    up, left = height // SHIFT, width // SHIFT
    moves = [torch.randint(2 * most + 1, (len(images),), generator=draw, device="cpu").tolist() for most in (up, left)]
    found = torch.empty_like(images)
    for i, (y, x) in enumerate(zip(*moves, strict=True)):  # one by one: images of all samples are large
        found[i] = pad(images[i : i + 1], (left, left, up, up), mode="reflect")[0, :, y : y + height, x : x + width]
    return found


CHANGES = {"mirrored": mirrored, "shifted": shifted}


def changed(batch: Batch, names: Sequence[str], generator: torch.Generator) -> Batch:
    """A batch whose images are changed in these ways, all images of one sample alike."""
    if not names:
        return batch
    seed = int(torch.randint(1 << 62, (1,), generator=generator, device="cpu"))

    def one(value: Any) -> Any:
        draw = torch.Generator().manual_seed(seed)
        for name in names if _is_image(value) else ():
            value = CHANGES[name](value, draw)
        return value

    return tree_map(one, batch)


def harmless(
    batch: Batch, outputs: Callable[[Batch], T], damage: Callable[[T, T], Tensor], generator: torch.Generator
) -> tuple[str, ...]:
    """The changes that do at most ``HARMLESS`` of the ``damage`` to the ``outputs`` of a batch, a tensor (samples,
    ...) or several, that giving each sample the output of another one does.
    """
    if not any(map(_is_image, tree_flatten(batch)[0])):
        return ()
    reference = outputs(batch)
    most = HARMLESS * float(damage(reference, tree_map(lambda one: one.roll(1, 0), reference)).mean())
    return tuple(
        name for name in CHANGES if float(damage(reference, outputs(changed(batch, [name], generator))).mean()) <= most
    )


def _is_image(value: Any) -> bool:
    """Whether an argument is a tensor of images; it may be anything that a model takes."""
    images = isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()
    return images and min(value.shape[-2:]) >= LEAST_SIDE
