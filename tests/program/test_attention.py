"""Fused attention is seen as its products and its softmax, and both products get sites."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantkit.program.composites import decomposed_attention, parts_of
from quantkit.program.intercept import OpKey, intercept
from quantkit.program.record import record
from quantkit.program.sites import place_sites
from quantkit.targets import Target

OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.tensor([[True, False, True], [True, True, True], [False, True, True]])},
    "float mask": {"attn_mask": torch.tensor([[0.0, -1.0, 2.0], [0.5, 0.0, -torch.inf], [0.0, 0.0, 1.0]])},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_decomposed_attention_is_torchs(options: dict[str, object]) -> None:
    query, key, value = torch.randn(3, 2, 4, 3, 8, dtype=torch.float64)
    options = {n: o.double() if isinstance(o, Tensor) and o.is_floating_point() else o for n, o in options.items()}
    wanted = F.scaled_dot_product_attention(query, key, value, **options)  # type: ignore[arg-type]
    found = decomposed_attention(query, key, value, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_shared_heads_are_repeated() -> None:
    query, key, value = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    wanted = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(decomposed_attention(query, key, value, enable_gqa=True), wanted)


@pytest.mark.parametrize(("args", "kwargs"), [((0, 0, 0, None, 0.1), {}), ((0, 0, 0), {"dropout_p": 0.1})])
def test_attention_with_dropout_stays_whole(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    assert parts_of("scaled_dot_product_attention", args, kwargs) is None
    assert parts_of("scaled_dot_product_attention", (0, 0, 0), {}) is decomposed_attention


class Attention(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.way == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v)
        elif self.way == "matmul":
            mixed = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        else:
            flat = [y.flatten(0, 1) for y in (q, k, v)]
            mixed = torch.bmm(torch.softmax(torch.bmm(flat[0], flat[1].mT) * 0.5, -1), flat[2])
            mixed = mixed.reshape(x.shape[0], 2, -1, 4)
        return self.proj(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("way", ["fused", "matmul", "bmm"])
def test_products_of_attention_get_sites(way: str) -> None:
    model = Attention(way).eval()
    found = record(model, ((torch.randn(2, 5, 8),), {}))
    sites = place_sites(model, found, Target.load("onnxruntime-cpu"), ["qkv", "proj"])
    product = "bmm" if way == "bmm" else "matmul"
    assert [site.name for site in sites] == ["input", "qkv", "/softmax", f"/{product}.1"]
    assert len(sites[1].echoes) == 3  # queries, keys turned, values
    alone = place_sites(model, found, Target.load("onnxruntime-cpu"), ["proj"])
    assert [site.name for site in alone] == [f"/{product}.1"]  # no operand comes from a quantized layer


def test_interception_changes_nothing() -> None:
    model, seen = Attention("fused").eval(), []
    x = torch.randn(2, 5, 8)

    def note(key: OpKey, func, args, kwargs):  # type: ignore[no-untyped-def]
        seen.append(key.op)
        return func(*args, **kwargs)

    with intercept(model, note):
        found = model(x)
    assert "scaled_dot_product_attention" not in seen
    assert [op for op in seen if op in ("matmul", "softmax")] == ["matmul", "softmax", "matmul"]
    torch.testing.assert_close(found, model(x))
