"""Changed images: what they are, and that a network says which of them it hardly minds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.program.inputs import Batch
from quantkit.reconstruction.augmentation import CHANGES, changed, harmless, mirrored, shifted
from quantkit.sensitivity.damage import kl_rows


def images(count: int = 40, height: int = 16, width: int = 24) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def draw(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_about_half_the_images_are_mirrored_the_others_as_they_were() -> None:
    x = images(200)
    found = mirrored(x, draw())
    same = (found == x).flatten(1).all(1)
    assert (found[~same] == x[~same].flip(-1)).all()
    assert 70 < int(same.sum()) < 130


def test_shifted_images_are_windows_of_reflected_ones_at_every_offset() -> None:
    x = images(300)
    found = shifted(x, draw())
    wide = pad(x, (3, 3, 2, 2), mode="reflect")
    offsets = set()
    for one, around in zip(found, wide, strict=True):
        places = [
            (top, left)
            for top in range(5)
            for left in range(7)
            if torch.equal(one, around[:, top : top + 16, left : left + 24])
        ]
        assert len(places) == 1
        offsets.update(places)
    assert len(offsets) == 35


def test_all_images_of_a_sample_change_alike_and_nothing_else_does() -> None:
    x, labels, numbers = images(), torch.arange(40), torch.randn(40, 5)
    (first, found), rest = changed(((x, labels), {"depth": x[:, :1], "numbers": numbers}), list(CHANGES), draw())
    assert torch.equal(found, labels)
    assert torch.equal(rest["numbers"], numbers)
    assert torch.equal(rest["depth"], first[:, :1])
    assert not torch.equal(first, x)
    batch: Batch = ((x,), {})
    assert changed(batch, (), draw()) is batch


def test_the_same_seed_changes_alike_and_draws_follow_each_other() -> None:
    batch: Batch = ((images(),), {})
    generator = draw()
    first, second = (changed(batch, list(CHANGES), generator)[0][0] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(changed(batch, list(CHANGES), draw())[0][0], first)


def sides(x: Tensor) -> Tensor:
    """Logits that tell the left from the right half, whatever is in between."""
    return 20 * torch.stack([x[..., :4].mean((1, 2, 3)), x[..., -4:].mean((1, 2, 3))], 1)


def brightness(x: Tensor) -> Tensor:
    return 20 * torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1)


def rows_and_columns(x: Tensor) -> Tensor:
    """Logits of single pixels: nothing may move."""
    return 5 * x[:, 0, 6:8, 6:8].flatten(1)


def smooth(count: int = 64) -> Tensor:
    """Images that are one ramp each from left to right, of random steepness and brightness."""
    steep, level = torch.randn(2, count, 1, 1, 1, generator=draw())
    return (level + steep * torch.linspace(-1, 1, 24)).expand(count, 3, 16, 24).contiguous()


@pytest.mark.parametrize(
    ("network", "x", "expected"),
    [
        (brightness, smooth(), ("mirrored", "shifted")),
        (sides, smooth(), ("shifted",)),
        (rows_and_columns, images(64), ()),
        (brightness, torch.randn(64, 3, 4, 4), ()),
        (lambda x: x[:, :2], torch.randn(64, 5), ()),
    ],
)
def test_a_change_is_harmless_where_the_outputs_say_so(network, x: Tensor, expected: tuple[str, ...]) -> None:
    def damage(wanted: Tensor, found: Tensor) -> Tensor:
        return kl_rows(wanted.log_softmax(-1), found.log_softmax(-1))

    assert harmless(((x,), {}), lambda batch: network(*batch[0]), damage, draw()) == expected
