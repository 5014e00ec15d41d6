"""Rows under padding count nowhere, wherever a model has them, and however long its sequences are padded."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.program.inputs import Batch
from quantkit.program.intercept import OpKey, own_inputs
from quantkit.program.padding import Padding, are_padded
from quantkit.ranges.statistics import layer_hessians, site_histograms
from quantkit.session import Session
from quantkit.simulation.model import as_float, run_with
from quantkit.stages.inputs import Inputs
from quantkit.targets import Target

WIDTH, HEADS, WORDS = 8, 2, 30
LENGTHS = (4, 2, 5, 3, 4, 3, 5, 2)


class Encoder(nn.Module):
    """A block of attention over words, and the mean of those that are no padding. ``heads``: "apart" in an axis of
    their own, or "together" with the samples; ``flat``: the feed-forward part reads words of all samples as rows.
    """

    def __init__(self, heads: str = "apart", flat: bool = False) -> None:
        super().__init__()
        self.heads, self.flat = heads, flat
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(16, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        samples, length = words.shape
        x = self.words(words) + self.places(torch.arange(length))
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        hidden = attention_mask[:, None, None, :] == 0
        if self.heads == "together":
            q, k, v = (y.flatten(0, 1) for y in (q, k, v))
            hidden = hidden[:, 0].repeat_interleave(HEADS, 0)
        scores = (q @ k.transpose(-2, -1)).masked_fill(hidden, -1e9)
        mixed = scores.softmax(-1) @ v
        if self.heads == "together":
            mixed = mixed.unflatten(0, (samples, HEADS))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.norm(x)
        if self.flat:
            y = y.flatten(0, 1)
        y = self.down(self.up(y).relu())
        x = x + (y.unflatten(0, (samples, length)) if self.flat else y)
        kept = attention_mask.unsqueeze(-1)
        return (x * kept).sum(1) / kept.sum(1)


def batches(length: int, seed: int = 0, filler: int = 0) -> list[dict[str, Tensor]]:
    """Sentences padded to ``length`` with a word, in batches of four."""
    draws = torch.Generator().manual_seed(seed)
    words = torch.full((len(LENGTHS), length), filler)
    mask = torch.zeros(len(LENGTHS), length, dtype=torch.long)
    for i, own in enumerate(LENGTHS):
        words[i, :own] = torch.randint(1, WORDS, (own,), generator=draws)
        mask[i, :own] = 1
    return [{"attention_mask": mask[i : i + 4], "words": words[i : i + 4]} for i in (0, 4)]


def sentences(length: int) -> list[Batch]:
    """The same sentences one by one, without padding."""
    found = zip(batches(length), (LENGTHS[:4], LENGTHS[4:]), strict=True)
    return [((), {k: x[i : i + 1, :n] for k, x in one.items()}) for one, own in found for i, n in enumerate(own)]


def session_of(model: nn.Module, data: list[dict[str, Tensor]]) -> Session:
    return Session.open(model, Inputs.of(model, data, None, None), Target.load("onnxruntime-cpu"))


def values_of(model: nn.Module, batch: Batch) -> dict[OpKey, Tensor]:
    """All that the calls of a model make of a batch."""
    found: dict[OpKey, Tensor] = {}

    def keep(place: OpKey, x: Tensor) -> Tensor:
        found[place] = x.clone()
        return x

    args, kwargs = own_inputs(*batch)
    with torch.no_grad():
        run_with(model, keep, args, kwargs)
    return found


@pytest.mark.parametrize(("heads", "flat"), [("apart", False), ("together", True)])
def test_what_other_padding_changes_is_padding(heads: str, flat: bool) -> None:
    """Whatever takes another value where sentences are padded with another word is under padding, and the rest is
    just what there are words for.
    """
    model = Encoder(heads, flat).eval()
    session = session_of(model, batches(7))
    padding = session.prepared.padding
    assert padding is not None
    one, other = (((), batches(7, filler=filler)[0]) for filler in (0, 1))
    before, after = (values_of(session.prepared.model, batch) for batch in (one, other))
    alone = [values_of(session.prepared.model, batch) for batch in sentences(7)]
    looked_at = 0
    for place, x in before.items():
        if place not in padding.places or not x.is_floating_point():
            continue
        live = padding.live(padding.places[place], x, padding.given(one))
        looked_at += live is not None
        live = torch.ones_like(x, dtype=torch.bool) if live is None else live.expand_as(x)
        assert torch.equal(x[live], after[place][live]), place
        if len({found[place].shape for found in alone}) > 1:  # what follows lengths: as many as in all sentences
            sizes = [found[place].numel() for found in alone[:4]]
            assert int(live.sum()) == (max(sizes) if x.shape == (7, WIDTH) else sum(sizes)), place
    assert looked_at >= 10


def test_moments_are_those_of_sentences_one_by_one() -> None:
    model = Encoder().eval()
    session = session_of(model, batches(9))
    ready = session.prepared
    floats = as_float(ready.model, ready.weights)
    names = ["qkv", "out", "up", "down"]
    found = layer_hessians(floats, ready.program, names, session.inputs.batches, padding=ready.padding)
    wanted = layer_hessians(floats, ready.program, names, sentences(9))
    counted = layer_hessians(floats, ready.program, names, session.inputs.batches)
    for name in names:
        torch.testing.assert_close(found[name].hessian, wanted[name].hessian, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(counted[name].hessian, wanted[name].hessian, rtol=1e-2)


def results(budget: str, model: nn.Module, lengths: tuple[int, ...]) -> list[quantkit.Result]:
    return [quantkit.quantize(model, budget, calibration=batches(n), progress=False) for n in lengths]


@pytest.mark.parametrize(("budget", "lengths"), [("w8a8", (5, 8, 13)), ("6 bits", (5, 9))])
def test_results_do_not_change_with_the_length_of_padding(budget: str, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for one, other in pairwise(results(budget, Encoder().eval(), lengths)):
        assert one.plan.schemes == other.plan.schemes
        assert one.quantized.ranges.keys() == other.quantized.ranges.keys()
        for name, weight in one.quantized.weights.items():
            same = weight.codes == other.quantized.weights[name].codes
            assert same.float().mean() > 0.999, name  # sums of other lengths may tip one over
        for name, found in one.quantized.ranges.items():
            assert found.scale == pytest.approx(other.quantized.ranges[name].scale, rel=1e-4), name


def test_without_masks_nothing_is_padding() -> None:
    whole = [{"words": one["words"], "attention_mask": torch.ones_like(one["words"])} for one in batches(7)]
    model = Encoder().eval()
    assert not are_padded(model, [((), one) for one in whole])
    assert session_of(model, whole).prepared.padding is None


class Torchs(nn.Module):
    """torch's own encoder, whose masks mark padding, on vectors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 20, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=src_key_padding_mask)


def test_masks_of_torch_mark_padding() -> None:
    model = Torchs().eval()
    x = torch.randn(4, 6, WIDTH)
    mask = torch.arange(6) >= torch.tensor(LENGTHS[:4]).unsqueeze(1)
    x[mask] = 1e4
    session = session_of(model, [(x, mask)])
    rule = session.reference("auto").damage
    assert rule.counts == (sum(LENGTHS[:4]),)
    found = site_histograms(
        session.prepared.model, session.prepared.sites, session.inputs.batches, padding=session.prepared.padding
    )
    assert len(found) > 4
    assert all(histogram.extremes.high < 100 for histogram in found.values())


class OneLength(nn.Module):
    """A model that takes sentences of seven words only, padded or not."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mixing, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(7 * WIDTH, 8), nn.Linear(8, 3)

    def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(words) * attention_mask.unsqueeze(-1)
        return self.head(self.mixing(x.reshape(-1, 7 * WIDTH)).relu())


def test_padding_that_cannot_be_followed_is_told(caplog: pytest.LogCaptureFixture) -> None:
    session = session_of(OneLength().eval(), batches(7))
    assert session.prepared.padding is None
    assert "positions under padding count as data" in caplog.text


def test_masks_are_found_whatever_the_order_of_a_dict() -> None:
    model = Encoder().eval()
    session = session_of(model, batches(7))
    padding = session.prepared.padding
    assert isinstance(padding, Padding)
    (number,) = padding.masks
    assert session.prepared.program.inputs.index(number) == 1  # sorted by name it would come first


SIZES = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 16, "initializer_range": 0.3}


def of_transformers(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=1)).eval()


def tokens(length: int, on_left: bool = False) -> list[dict[str, Tensor]]:
    """Sentences padded to a length, on one side or the other, there with positions that begin behind the padding, as
    generation counts them: what is rotated by its position is the same then. The two longest come first.
    """
    order = torch.tensor(LENGTHS).argsort(descending=True, stable=True)
    every = {name: torch.cat([one[name] for one in batches(length, filler=7)])[order] for name in batches(length)[0]}
    if on_left:
        every = {
            name: torch.stack([row.roll(length - LENGTHS[i]) for i, row in zip(order.tolist(), x, strict=True)])
            for name, x in every.items()
        }
        every["position_ids"] = (every["attention_mask"].cumsum(1) - 1).clamp(min=0)
    every["input_ids"] = every.pop("words")
    return [{name: x[start : start + 4] for name, x in every.items()} for start in (0, 4)]


@pytest.mark.parametrize(
    ("name", "on_left", "budget"),
    [("bert", False, "w4a8"), ("bert", False, "7 bits"), ("llama", False, "w4g8z"), ("llama", True, "w4a8")],
)
def test_networks_of_transformers_do_not_see_padding(name: str, on_left: bool, budget: str) -> None:
    """Their code takes another path where a mask hides nothing, as that of the longest sentences does."""
    model = of_transformers(name)
    options = {"schemes": ["w4a8", "w8a8"]} if budget == "7 bits" else {}
    one, *others = (
        quantkit.quantize(model, budget, tokens(length, on_left), correction=None, progress=False, **options)
        for length in (5, 8, 13)
    )
    for other in others:
        assert one.plan.digest() == other.plan.digest()
        for layer, weight in one.quantized.weights.items():
            same = weight.codes == other.quantized.weights[layer].codes
            assert same.float().mean() > 0.999, layer
        for site, found in one.quantized.ranges.items():
            assert found.scale == pytest.approx(other.quantized.ranges[site].scale, rel=1e-4), site
