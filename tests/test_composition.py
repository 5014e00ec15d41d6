"""What a model's bytes consist of: sums that add up, reasons in order of their bytes, and words that say so."""

from __future__ import annotations

import pytest

import quantkit
from quantkit.errors import InfeasibleBudget
from quantkit.formats import Scheme
from quantkit.plan import COMPOSITION, Composition, Layer
from tests.program.models import randn
from tests.stages.networks import images, small
from tests.stages.test_one_scheme import mixed

LAYERS = {
    "a": Layer("a", "conv2d", (8, 25), float_bytes=800),
    "b": Layer("b", "linear", (10, 10), float_bytes=400, reason="it reads a constant"),
    "c": Layer("c", "linear", (10, 30), float_bytes=1200, reason="it reads a constant"),
    "d": Layer("d", "embedding", (50, 10), float_bytes=2000, reason="embedding is not supported"),
    "e": Layer("e", "linear", (4, 5), float_bytes=80),
}


def test_bytes_add_up_and_reasons_come_largest_first() -> None:
    made = Composition.of(LAYERS, {"a": Scheme.parse("w8a8"), "e": Scheme()}, other=100, model=5000)
    assert (made.quantized, made.float_bytes, made.other, made.total) == (200 + 4 * 8, 3680, 100, 4012)
    assert [(one.names, one.bytes) for one in made.floats] == [(("d",), 2000), (("c", "b"), 1600), (("e",), 80)]
    assert made.why_float() == (
        "d (2,000 bytes): embedding is not supported; c, b (1,600 bytes): it reads a constant; "
        "e (80 bytes): left float by the plan"
    )
    assert str(made).startswith("model 5,000 bytes -> 4,012 bytes: 232 quantized weights, 100 biases,")


def test_without_float_layers_nothing_is_said_of_them() -> None:
    made = Composition.of({"e": LAYERS["e"]}, {"e": Scheme.parse("w4")}, other=0, model=80)
    assert made.why_float() == ""
    assert "float:" not in str(made)


def test_many_layers_and_reasons_are_cut_short() -> None:
    sizes = {f"n{k}": k for k in range(1, 30)}
    layers = {n: Layer(n, "linear", (k, 1), 4 * k, reason=f"because {k // 5}") for n, k in sizes.items()}
    said = Composition.of(layers, {}, 0, 0).why_float()
    assert said.startswith("n29, n28, n27 and 2 more (540 bytes): because 5; n24, n23, n22 and 2 more")
    assert said.endswith("; 3 more reasons (420 bytes)")


@pytest.mark.parametrize("schemes", [["w8a8"], None])
@pytest.mark.parametrize("budget", ["2 bits", "1 KB"])
def test_a_refusal_names_what_holds_the_size_up_and_what_would_do(budget: str, schemes: list[str] | None) -> None:
    x = randn(8, 2, 6, 6)
    with pytest.raises(InfeasibleBudget) as refused:
        quantkit.quantize(mixed(), budget, x, schemes=schemes, rules={"up": "float"}, progress=False)
    assert "up (1,024 bytes): kept float by a rule" in str(refused.value)
    unit = "bits" if "bits" in budget else "KB"
    assert f"the smallest that can be reached is {refused.value.smallest:g} {unit}." in str(refused.value)
    least, narrowest = f"{refused.value.smallest} {unit}", ["w8a8"] if schemes else ["w2a8"]
    plan = quantkit.quantize(mixed(), least, x, schemes=narrowest, rules={"up": "float"}, progress=False).plan
    assert "1,024 float: up (1,024 bytes): kept float by a rule" in str(plan)


def test_a_plan_says_what_its_bytes_consist_of_when_it_was_made_and_when_it_was_applied() -> None:
    made = quantkit.quantize(small(), "w8a8", images(), rules={"mix": "float"}, progress=False)
    total = f"model {4 * sum(t.numel() for n, t in small().state_dict().items() if 'tracked' not in n):,} bytes -> "
    said = made.plan.provenance[COMPOSITION]
    assert said.startswith(f"{total}{made.plan.total_bytes:,} bytes")
    assert "576 float: mix (576 bytes): kept float by a rule" in said
    mapped = quantkit.apply(small(), {"conv": "w8a8"}, images(), progress=False).plan
    assert "stem.0, mix, head (1,920 bytes): left float by the plan" in mapped.provenance[COMPOSITION]
