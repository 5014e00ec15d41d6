"""Scaling of channels: what a model computes stays to the last digits; what lets no factors through says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantkit.formats import ActivationFormat, WeightFormat
from quantkit.program.inputs import Batch
from quantkit.program.intercept import tensors_of
from quantkit.targets import Target
from quantkit.transforms.channel_groups import Group, columns_of, groups_of, scale
from quantkit.transforms.channel_scaling import KEYS, LAYERS, NORMS, STRENGTHS, kind_of
from quantkit.transforms.known import TRANSFORMS
from quantkit.transforms.prepare import Prepared, prepare
from quantkit.transforms.registry import Setting
from tests.program.architectures import ARCHITECTURES
from tests.program.nets.entry import BatchBuilder
from tests.program.nets.huggingface import decoder, text, transformers

TARGET = Target.load("onnxruntime-cpu")


class _InDouble(TorchFunctionMode):
    """Casts to float32 inside norms and softmax become casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "float":
            func = Tensor.double

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


@contextmanager
def in_double() -> Iterator[None]:
    with _InDouble(), torch.no_grad():
        yield


def architecture(name: str) -> tuple[nn.Module, BatchBuilder]:
    if name != "mistral":
        return ARCHITECTURES[name].build(), ARCHITECTURES[name].batch
    hf = transformers()
    torch.manual_seed(0)
    return hf.MistralForCausalLM(hf.MistralConfig(**decoder(head_dim=4, sliding_window=3))).eval(), text()


def ready_of(name: str) -> Prepared:
    model, batch = architecture(name)
    return prepare(model, [batch(2)], TARGET)


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    with in_double():
        made = model(*map(wide, batch[0]), **{key: wide(x) for key, x in batch[1].items()})
    return torch.cat([x.flatten() for x in tensors_of(made) if x.is_floating_point()])


def drawn(group: Group, seed: int = 0) -> Tensor:
    """Factors between about 1/20 and 20."""
    return torch.exp(torch.randn(group.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


# network -> how many groups of each kind let factors through, and why others do not
FOUND: dict[str, tuple[tuple[int, int, int], dict[str, str]]] = {
    # a residual sum reads all norms but the last, of which the pooler takes the first token
    "bert": ((1, 2, 2), {"bert.embeddings.LayerNorm": "/layer_norm reads it"}),
    "vit": ((5, 2, 2), {"vit.layers.0.mlp.fc1": "/gelu reads it"}),
    "gpt2": ((4, 2, 2), {"transformer.ln_f": "transformer.wte is a embedding, or its weight is used otherwise too"}),
    "llama": ((5, 4, 2), {"model.layers.0.mlp.gate_proj": "/silu reads it"}),
    "llama_eager_padded": ((5, 4, 2), {}),
    "mistral": ((5, 4, 2), {}),
    "qwen3": ((4, 4, 2), {"model.layers.0.self_attn.k_proj": "k_norm/pow reads it"}),  # its gains are scaled instead
    "gemma2": ((4, 4, 2), {"model.layers.0.post_attention_layernorm": "/add adds it to something else"}),
    "swin": ((10, 4, 4), {"swin.embeddings.norm": "/layer_norm reads it"}),
}


@pytest.mark.parametrize("name", FOUND)
def test_any_factors_leave_outputs_as_they_are(name: str) -> None:
    ready, batch = ready_of(name), architecture(name)[1](3, seed=4)
    groups, reasons = groups_of(ready)
    counts, told = FOUND[name]
    assert tuple(sum(kind_of(group) == kind for group in groups) for kind in (NORMS, LAYERS, KEYS)) == counts
    assert len({group.name for group in groups}) == len(groups)
    for part, why in told.items():
        assert why in reasons[part]
    ready.model.double()
    before = outputs(ready.model, batch)
    for group in groups:
        scale(ready.weights, group, drawn(group))
    assert float((outputs(ready.model, batch) - before).abs().max() / before.abs().max()) < 1e-9


def test_pairs_that_a_rotation_mixes_have_one_factor_in_all_query_heads_of_a_group() -> None:
    ready = ready_of("llama")  # four heads of queries and two of keys, of four channels
    group = next(group for group in groups_of(ready)[0] if kind_of(group) == KEYS)
    query, key = (member.channel.reshape(-1, 4) for member in group.members)
    assert {member.inverse for member in group.members} == {False, True}
    assert all(torch.equal(head[:2], head[2:]) for head in (*query, *key))
    assert torch.equal(query, key.repeat_interleave(2, 0))
    assert group.size == 4


class Convolutions(nn.Module):
    """A depthwise pair behind a ReLU, whose sum with what it reads ties its last channels to the first layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.point, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, 4)
        self.clipped, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(x + self.point(F.leaky_relu(self.depthwise(F.pad(x, (1, 0))[..., 1:]))))
        x = self.head(F.avg_pool2d(x, 2).mean((2, 3)))
        return self.last(F.relu6(self.clipped(F.relu(x))))


def convolutions() -> tuple[nn.Module, Batch]:
    torch.manual_seed(1)
    return Convolutions().eval(), ((torch.randn(4, 3, 12, 12),), {})


def test_pairs_of_convolutions_sums_and_pools() -> None:
    model, batch = convolutions()
    ready = prepare(model, [batch], TARGET)
    groups, reasons = groups_of(ready)
    tied = {(m.kind, m.name) for m in groups[0].members}
    assert {("rows", "first"), ("columns", "depthwise"), ("rows", "point"), ("columns", "head")} == tied
    assert [group.name for group in groups] == ["first -> depthwise", "depthwise -> point", "head -> clipped"]
    assert "/hardtanh reads it" in reasons["clipped"] or "/relu6 reads it" in reasons["clipped"]
    ready.model.double()
    before = outputs(ready.model, batch)
    for group in groups:
        scale(ready.weights, group, drawn(group))
    torch.testing.assert_close(outputs(ready.model, batch), before, rtol=0, atol=1e-12)


def test_columns_of_grouped_convolutions_are_those_of_the_channels_that_they_read() -> None:
    layer, own = nn.Conv2d(6, 9, 2, groups=3), torch.rand(6) + 0.5
    x = torch.randn(2, 6, 5, 5)
    scaled = F.conv2d(x * own[:, None, None], layer.weight / columns_of(own, layer.weight, 3), layer.bias, groups=3)
    torch.testing.assert_close(scaled, layer(x))


class Pair(nn.Module):
    """A norm with channels of very different size, and two layers that read it."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(8), nn.Linear(8, 5, bias), nn.Linear(8, 3)
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(-1, 2, 8))
            self.norm.bias.copy_(torch.linspace(-50, 200, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.cat([self.one(y), self.two(y)], -1)


def setting_of(model: nn.Module, batch: Batch, weight: str = "4", activation: str = "8") -> Setting:
    ready = prepare(model, [batch], TARGET)
    weights = dict.fromkeys(ready.quantizable, WeightFormat(weight))
    sites = {site.name: ActivationFormat(activation) for site in ready.sites} if activation else {}
    return Setting(ready, [batch], weights, sites)


def test_factors_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    model, batch = Pair().eval(), ((torch.randn(40, 8),), {})
    (change,) = TRANSFORMS[NORMS].propose(setting_of(model, batch)).changes
    x = model.norm(batch[0][0]).detach().double()
    record = change.record()
    largest = [max(abs(float(v)) for v in x[:, j]) for j in range(8)]
    weight = [
        max(float(layer.weight[:, j].detach().abs().max()) for layer in (model.one, model.two)) for j in range(8)
    ]
    a = record["strength"]
    naive = torch.tensor([w ** (1 - a) / v**a for v, w in zip(largest, weight, strict=True)], dtype=torch.float64)
    naive /= naive.log().mean().exp()
    assert a in STRENGTHS and record["by"] == "largest" and record["at"] == "norm -> one"
    torch.testing.assert_close(change.factors, naive)  # type: ignore[attr-defined]


def test_factors_of_weights_alone_go_by_mean_magnitudes() -> None:
    torch.manual_seed(0)
    model, batch = Pair().eval(), ((torch.randn(40, 8),), {})
    (change,) = TRANSFORMS[NORMS].propose(setting_of(model, batch, "3", "")).changes
    mean = model.norm(batch[0][0]).detach().double().abs().mean(0)
    naive = mean ** -change.record()["strength"]
    assert change.record()["by"] == "mean"
    torch.testing.assert_close(change.factors, naive / naive.log().mean().exp())  # type: ignore[attr-defined]


def test_shifts_put_every_channel_around_zero_and_need_biases_behind() -> None:
    torch.manual_seed(0)
    model, batch = Pair().eval(), ((torch.randn(40, 8),), {})
    setting = setting_of(model, batch)
    before = setting.ready.model(*batch[0])
    (change,) = TRANSFORMS["norm-shifting"].propose(setting).changes
    change.apply(setting.ready.weights)
    x = setting.ready.model.norm(batch[0][0])
    torch.testing.assert_close(x.amax(0), -x.amin(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(setting.ready.model(*batch[0]), before, rtol=1e-5, atol=1e-3)
    refused = TRANSFORMS["norm-shifting"].propose(setting_of(Pair(bias=False).eval(), batch))
    assert refused.changes == () and refused.reasons == {"norm": "one has no bias to take up the shift"}


@pytest.mark.parametrize("kind", [NORMS, KEYS, LAYERS])
def test_what_a_plan_records_gives_the_same_factors_again(kind: str) -> None:
    model, batch = architecture("vit")
    setting = setting_of(model, batch(4))
    changes = TRANSFORMS[kind].propose(setting).changes
    again = TRANSFORMS[kind].redo(setting, [change.record() for change in changes])
    assert len(changes) == len(again) > 0
    for one, other in zip(changes, again, strict=True):
        assert torch.equal(one.factors, other.factors)  # type: ignore[attr-defined]


def test_parameters_in_half_precision_get_powers_of_two() -> None:
    model, batch = architecture("llama")
    setting = setting_of(model.bfloat16(), batch(4))
    (change, *_) = TRANSFORMS[NORMS].propose(setting).changes
    args, kwargs = batch(2)
    before = setting.ready.float_model()(*args, **kwargs).logits
    change.apply(setting.ready.weights)
    assert torch.equal(change.factors.log2().round(), change.factors.log2())  # type: ignore[attr-defined]
    assert torch.equal(setting.ready.float_model()(*args, **kwargs).logits, before)
