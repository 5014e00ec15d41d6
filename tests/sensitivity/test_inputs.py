"""Inputs to measure on: convex mixes of pairs, whatever the batches, or None where inputs cannot be mixed."""

from __future__ import annotations

import pytest
import torch

from quantkit.program.inputs import Batch
from quantkit.sensitivity.inputs import LEAST, MOST, mixed_pairs
from tests.sensitivity.networks import generator


def test_every_sample_is_mixed_with_another_one_in_the_stated_proportion() -> None:
    one_hot = torch.eye(20)
    mixed = torch.cat([args[0] for args, _ in mixed_pairs([((part,), {}) for part in one_hot.split(6)], generator())])
    own, partner = mixed.diag(), mixed - torch.diag(mixed.diag())
    assert (own >= LEAST).all() and (own <= MOST).all() and len(own.unique()) == 20
    assert torch.allclose(mixed.sum(1), torch.ones(20))
    assert ((partner > 0).sum(1) == 1).all() and ((partner > 0).sum(0) == 1).all()


def test_all_arguments_of_a_sample_are_mixed_alike_and_batches_keep_their_sizes() -> None:
    x = torch.eye(10)
    batches: list[Batch] = [((a,), {"b": {"deep": a.clone()}}) for a in x.split(4)]
    mixed = mixed_pairs(batches, generator())
    assert [len(args[0]) for args, _ in mixed] == [4, 4, 2]
    assert all(torch.equal(args[0], kwargs["b"]["deep"]) for args, kwargs in mixed)


def test_mix_depends_on_the_seed_and_not_on_the_split() -> None:
    x = torch.randn(12, 3, generator=generator())
    whole = mixed_pairs([((x,), {})], generator())[0][0][0]
    parts = torch.cat([args[0] for args, _ in mixed_pairs([((p,), {}) for p in x.split(5)], generator())])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, mixed_pairs([((x,), {})], torch.Generator().manual_seed(1))[0][0][0])


@pytest.mark.parametrize(
    "batches",
    [
        [((torch.ones(4, 3, dtype=torch.long),), {})],
        [((torch.ones(4, 3), torch.ones(4, 3, dtype=torch.bool)), {})],
        [((torch.ones(4, 3),), {}), ((torch.ones(4, 5),), {})],
        [((torch.ones(4, 3), torch.ones(2, 3)), {})],
        [((torch.ones(4),), {})],
        [((torch.ones(1, 3),), {})],
        [],
    ],
    ids=["tokens", "mask", "shapes differ", "counts differ", "scalars", "one sample", "nothing"],
)
def test_inputs_that_cannot_be_mixed_are_left_alone(batches: list[Batch]) -> None:
    assert mixed_pairs(batches, generator()) is None


def test_arguments_that_are_no_samples_stay_beside_mixed_ones() -> None:
    x = torch.arange(12.0).reshape(4, 3)
    found = mixed_pairs([((x[:2], None), {"flag": True}), ((x[2:], None), {"flag": True})], generator())
    assert found is not None
    assert [(args[1], kwargs) for args, kwargs in found] == [(None, {"flag": True})] * 2
    assert not torch.equal(torch.cat([args[0] for args, _ in found]), x)
