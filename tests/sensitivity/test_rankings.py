"""Rankings of blocks and layers on a tiny transformer, by hand; and that they are refused where damages are added."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.errors import InvalidRequest
from quantkit.sensitivity import ESTIMATORS, RANKINGS, require_additive
from quantkit.sensitivity.blocks import find_blocks
from quantkit.sensitivity.damage import KLDamage
from quantkit.sensitivity.measure import Perturbation, Scores, Subject
from quantkit.sensitivity.zd import z_share
from tests.sensitivity.networks import (
    Transformer,
    classifier,
    inputs,
    perturbed,
    request_of,
    sequences,
    subject_of,
    transformer,
)

BLOCKS = ("blocks.0", "blocks.1", "blocks.2")
INSIDE = ("attention.qkv", "attention.out", "mlp.0", "mlp.2")


@pytest.fixture(scope="module")
def case() -> tuple[Subject, list[Perturbation], Tensor]:
    batches = sequences()
    request = request_of(transformer(), batches)
    return subject_of(request, batches), perturbed(request), torch.cat([args[0] for args, _ in batches])


def score(name: str, subject: Subject, changes: list[Perturbation]) -> Scores:
    return ESTIMATORS[name](subject, changes, False, torch.Generator())


def by_layer(changes: list[Perturbation], scores: Scores) -> dict[str, float]:
    return {p.owner: scores.damage[k] for k, p in enumerate(changes) if not p.place[1]}


def stream(model: Transformer, x: Tensor, skip: str = "") -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Logits, and (stream entering its block, what it adds) of every sublayer, with one block or sublayer skipped."""
    x, added = model.embed(x), {}
    for name, block in zip(BLOCKS, model.blocks, strict=True):
        entering = x
        for part, sublayer, norm in zip(("attention", "mlp"), (block.attention, block.mlp), block.norms, strict=True):
            update = sublayer(norm(x))
            added[f"{name}.{part}"] = entering, update
            x = x if skip in (name, f"{name}.{part}") else x + update
        added[name] = entering, x - entering
    return model.head(x), added


def test_blocks_and_sublayers_are_found_by_structure(case) -> None:
    subject, changes, _ = case
    layers = [p.owner for p in changes if p.format == "w4"]
    found = find_blocks(subject, layers)
    assert tuple(b.name for b in found) == BLOCKS
    assert all(b.layers == tuple(f"{b.name}.{part}" for part in INSIDE) for b in found)
    assert {n: p for b in found[:1] for n, p in b.sublayers.items()} == {
        "blocks.0.attention": ("blocks.0.attention.qkv", "blocks.0.attention.out"),
        "blocks.0.mlp": ("blocks.0.mlp.0", "blocks.0.mlp.2"),
    }


@torch.no_grad()
def test_lim_is_minus_the_mean_cosine_over_tokens_between_what_enters_and_leaves_a_block(case) -> None:
    subject, changes, x = case
    found = by_layer(changes, score("lim", subject, changes))
    _, added = stream(subject.model, x)
    for name in BLOCKS:
        entering, update = added[name]
        expected = -float(torch.cosine_similarity(entering, entering + update, dim=-1).mean())
        assert [found[f"{name}.{part}"] for part in INSIDE] == pytest.approx([expected] * 4, rel=1e-5)
    assert found["embed"] == found["head"] == 1 > max(found[f"{name}.mlp.0"] for name in BLOCKS)


@torch.no_grad()
def test_lim_of_a_layer_is_its_own_where_it_keeps_the_shape_else_its_blocks(case) -> None:
    subject, changes, x = case
    layers, blocks = (by_layer(changes, score(n, subject, changes)) for n in ("lim-layer", "lim"))
    model = subject.model
    seen: list[Tensor] = []
    hook = model.blocks[1].attention.out.register_forward_hook(lambda _, args, out: seen.extend([args[0], out]))
    model(x)
    hook.remove()
    expected = -float(torch.cosine_similarity(seen[0], seen[1], dim=-1).mean())
    assert layers["blocks.1.attention.out"] == pytest.approx(expected, rel=1e-5)
    assert layers["blocks.1.mlp.0"] == blocks["blocks.1.mlp.0"]


class InPlace(nn.Module):
    """A block that adds to its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x += self.layer(x)
        return x


def test_block_that_overwrites_its_input_is_compared_with_what_entered_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(InPlace(), InPlace(), nn.Linear(6, 4)).eval()
    batches = inputs(20)
    request = request_of(model, batches)
    subject, changes = subject_of(request, batches), perturbed(request)
    x = torch.cat([args[0] for args, _ in batches])
    with torch.no_grad():
        after = x + model[0].layer(x)
        skipped = model[2](x + model[1].layer(x))
        damage = KLDamage().rows(model[2](after + model[1].layer(after)), skipped).mean()
    lim, depth = (by_layer(changes, score(n, subject, changes)) for n in ("lim", "depth"))
    assert lim["0.layer"] == pytest.approx(-float(torch.cosine_similarity(x, after).mean()), rel=1e-5)
    assert depth["0.layer"] == pytest.approx(float(damage), rel=1e-4)


def test_zd_counts_weights_one_deviation_above_the_mean_of_their_block(case) -> None:
    subject, changes, _ = case
    found = by_layer(changes, score("zd", subject, changes))
    own = by_layer(changes, score("zd-layer", subject, changes))
    modules = dict(subject.model.named_modules())
    for name in BLOCKS:
        w = np.concatenate([modules[f"{name}.{p}"].weight.detach().numpy().astype(float).ravel() for p in INSIDE])
        expected = -float((w > w.mean() + w.std()).mean())
        assert [found[f"{name}.{part}"] for part in INSIDE] == pytest.approx([expected] * 4)
    w = modules["head"].weight.detach().numpy().astype(float)
    assert own["head"] == found["head"] == pytest.approx(-float((w > w.mean() + w.std()).mean()))
    assert own["blocks.0.mlp.0"] != found["blocks.0.mlp.0"]


def test_heavy_tails_have_a_lower_zd_than_a_normal_distribution() -> None:
    draw = np.random.default_rng(0)
    normal = z_share([torch.tensor(draw.normal(size=200_000))])
    heavy = z_share([torch.tensor(draw.standard_t(5, size=200_000))])
    assert normal == pytest.approx(0.1587, abs=3e-3) and heavy == pytest.approx(0.127, abs=4e-3)
    assert z_share([torch.ones(5)]) == 0


@torch.no_grad()
def test_depth_ranks_by_the_damage_of_skipping_a_sublayer(case) -> None:
    subject, changes, x = case
    scores = score("depth", subject, changes)
    found = by_layer(changes, scores)
    reference, added = stream(subject.model, x)
    for name in (*BLOCKS, "blocks.1.attention", "blocks.1.mlp"):
        rows = KLDamage().rows(reference.flatten(0, 1), stream(subject.model, x, skip=name)[0].flatten(0, 1))
        assert scores.notes["skipped"][name] == pytest.approx(float(rows.mean()), rel=1e-3)
        entering, update = added[name]
        size = float((update.norm(dim=-1) / entering.norm(dim=-1)).mean())
        assert scores.notes["contribution"][name] == pytest.approx(size, rel=1e-4)
        cosine = float(torch.cosine_similarity(update, entering, dim=-1).mean())
        assert scores.notes["cosine_with_stream"][name] == pytest.approx(cosine, rel=1e-3, abs=1e-5)
    assert found["blocks.1.mlp.2"] == scores.notes["skipped"]["blocks.1.mlp"]
    assert found["embed"] == found["head"] == max(scores.notes["skipped"].values())


@pytest.mark.parametrize("name", sorted(RANKINGS))
def test_ranking_is_labelled_and_refused_as_something_to_add_up(case, name: str) -> None:
    subject, changes, x = case
    scores = score(name, subject, changes)
    assert scores.ranking and scores.notes["ranking"] and np.isfinite(scores.damage).all()
    with pytest.raises(InvalidRequest, match=rf"'{name}' ranks layers.*Choose one of .*gram.*'by-rank'"):
        require_additive(name)
    with pytest.raises(InvalidRequest, match="ranks layers"):
        quantkit.profile(subject.model, [x], sensitivity=name, progress=False)


def test_additive_estimators_are_no_rankings(case) -> None:
    subject, changes, _ = case
    assert not score("kl", subject, changes[:2]).ranking
    assert {"gram", "kl", "hessian-trace"}.isdisjoint(RANKINGS)
    require_additive("gram")


def test_layers_are_ordered_by_importance_and_sites_rank_with_their_readers(case) -> None:
    subject, changes, _ = case
    scores = score("lim", subject, changes)
    importance = by_layer(changes, scores)
    order = sorted(importance, key=importance.__getitem__, reverse=True)
    assert set(order[:2]) == {"embed", "head"}
    site = next(k for k, p in enumerate(changes) if p.place[1] and subject.sites[p.owner].consumers == ("head",))
    assert scores.damage[site] == importance["head"]


@pytest.mark.parametrize("name", ["lim", "lim-layer", "depth"])
def test_network_without_blocks_is_refused_with_what_to_choose_instead(name: str) -> None:
    batches = inputs(12)
    request = request_of(classifier(), batches)
    with pytest.raises(InvalidRequest, match=rf"'{name}' ranks the blocks.*Choose 'gram'"):
        score(name, subject_of(request, batches), perturbed(request))
