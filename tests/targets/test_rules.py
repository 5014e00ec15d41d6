"""Which schemes a layer may take: later rules win, and a rule or candidate that cannot hold is refused by name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme
from quantkit.plan import Layer
from quantkit.targets import Target
from quantkit.targets.rules import candidate_schemes, decided_by_rule, matching, parse_schemes

TARGET = Target.load("onnxruntime-cpu")
WITH_GROUPS = replace(TARGET, weight_groups=True, weight_scales=("f32", "f16"))


def layer(name: str, shape: tuple[int, ...], reason: str = "") -> Layer:
    return Layer(name, "conv2d" if len(shape) == 4 else "linear", shape, 4 * math.prod(shape), reason=reason)


SHAPES = {
    "stem": (8, 3, 3, 3),
    "blocks.0.conv1": (8, 8, 3, 3),
    "blocks.0.conv2": (8, 8, 3, 3),
    "blocks.1.conv1": (16, 8, 3, 3),
    "head": (10, 16),
}
LAYERS = {name: layer(name, shape) for name, shape in SHAPES.items()}
UNCALLED = LAYERS | {"aux.head": layer("aux.head", (10, 16), "never called")}
DEFAULT = ("w2a8", "w3a8", "w4a8", "w5a8", "w6a8", "w8a8")


def candidates(rules: Any, schemes: Any = ("w4a8", "w8a8"), target: Target = TARGET) -> dict[str, tuple[str, ...]]:
    found = candidate_schemes(LAYERS, schemes, rules, target)
    return {name: tuple(str(scheme) for scheme in options) for name, options in found.items()}


@pytest.mark.parametrize(
    ("schemes", "expected"),
    [
        (None, DEFAULT),
        (["w4a8", "w8a8"], ("w4a8", "w8a8")),
        ("w8a8", ("w8a8",)),
        ("w8a8, w4a8 w2a8", ("w8a8", "w4a8", "w2a8")),
        (["w8a8", "W8A8 ", Scheme.parse("w8a8"), "float"], ("w8a8", "float")),
        (iter(["w3a8"]), ("w3a8",)),
    ],
    ids=lambda value: repr(value) if isinstance(value, str | list | tuple) else "an iterator",
)
def test_candidates_keep_their_order_without_repeats(schemes: Any, expected: tuple[str, ...]) -> None:
    assert tuple(str(scheme) for scheme in parse_schemes(schemes, TARGET)) == expected


def test_without_rules_every_layer_may_take_every_candidate_in_the_layers_order() -> None:
    for rules in (None, [], {}):
        found = candidates(rules)
        assert list(found) == list(LAYERS)
        assert set(found.values()) == {("w4a8", "w8a8")}


def test_a_later_rule_overrides_an_earlier_one() -> None:
    narrow_then_wide = [("blocks.*", "w2a8"), ("*.conv2", ["w6a8", "float"]), ("head", "float")]
    assert candidates(narrow_then_wide) == {
        "stem": ("w4a8", "w8a8"),
        "blocks.0.conv1": ("w2a8",),
        "blocks.0.conv2": ("w6a8", "float"),
        "blocks.1.conv1": ("w2a8",),
        "head": ("float",),
    }
    assert candidates(narrow_then_wide[::-1])["blocks.0.conv2"] == ("w2a8",)
    assert candidates(dict(narrow_then_wide)) == candidates(narrow_then_wide)


# Each pattern with the layers it means, written by hand.
PATTERNS = {
    "*": list(LAYERS),
    "stem": ["stem"],
    "blocks.*": ["blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1"],
    "*.conv1": ["blocks.0.conv1", "blocks.1.conv1"],
    "blocks.?.conv2": ["blocks.0.conv2"],
    "blocks.[1-9].*": ["blocks.1.conv1"],
    "*e*": ["stem", "head"],
}
wanted = st.lists(st.sampled_from(["float", *DEFAULT]), min_size=1, max_size=3, unique=True)


@given(st.lists(st.tuples(st.sampled_from(list(PATTERNS)), wanted), max_size=5))
def test_each_layer_takes_the_last_rule_that_means_it(rules: list[tuple[str, list[str]]]) -> None:
    expected = {}
    for layer in LAYERS:
        meant = [options for pattern, options in rules if layer in PATTERNS[pattern]]
        expected[layer] = tuple(meant[-1]) if meant else ("w4a8", "w8a8")
    assert candidates(rules) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("hed", "The rule 'hed' matches no layer. Did you mean 'head'? Layers: stem, blocks.0.conv1, blocks.0.conv2,"),
        ("*blocks.1.conv2", "The rule '*blocks.1.conv2' matches no layer. Did you mean 'blocks."),
        ("Stem", "The rule 'Stem' matches no layer. Did you mean 'stem'"),
        ("zzz*", "The rule 'zzz*' matches no layer. Layers: stem, "),
        ("", "The rule '' matches no layer. Layers: stem, "),
    ],
)
def test_a_rule_that_matches_nothing_is_refused_with_the_nearest_names(pattern: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        candidates([("*", "w8a8"), (pattern, "float")])
    assert message in str(caught.value)
    assert str(caught.value).endswith("blocks.0.conv1, blocks.0.conv2, blocks.1.conv1, head.")


@pytest.mark.parametrize("name", ["b.[ab]", "b.x*", "b.3x3 [dw]", "b.?"])
def test_the_name_of_a_layer_is_itself_alone(name: str) -> None:
    names = ["b.[ab]", "b.a", "b.b", "b.x*", "b.xy", "b.3x3 [dw]", "b.?"]
    layers = {other: layer(other, (4, 4)) for other in names}
    found = candidate_schemes(layers, ("w8a8",), {name: "float"}, TARGET)
    assert [other for other, options in found.items() if str(options[0]) == "float"] == [name]
    assert matching("b.x?", names) == ["b.x*", "b.xy"]
    assert [other for other in names if decided_by_rule(other, {name: "float"}, names)] == [name]


def test_of_many_layers_the_error_lists_the_first_eight() -> None:
    many = {name: layer(name, (4, 4)) for name in (f"layer{k}" for k in range(30))}
    with pytest.raises(InvalidRequest, match=r"Layers: layer0, .*, layer7, \.\.\.\.$"):
        candidate_schemes(many, None, {"fc": "float"}, TARGET)


@pytest.mark.parametrize("rules", [{"aux.*": "float"}, {"aux.head": ["w8a8", "float"]}, {"*head": "w8a8"}])
def test_a_rule_may_name_a_layer_that_stays_float_anyway(rules: dict[str, Any]) -> None:
    found = candidate_schemes(UNCALLED, None, rules, TARGET)
    assert list(found) == list(LAYERS)
    assert [str(s) for s in found["head"]] == (["w8a8"] if "*head" in rules else list(DEFAULT))


def test_a_rule_for_a_layer_that_must_stay_float_is_refused_with_the_reason() -> None:
    expected = "The rule 'aux.*' asks for w4a8, w8a8, and 'aux.head' stays float: never called. Leave the rule out or"
    with pytest.raises(InvalidRequest) as caught:
        candidate_schemes(UNCALLED, None, {"aux.*": ["w4a8", "w8a8"]}, TARGET)
    assert str(caught.value) == f"{expected} ask for 'float'."


def test_a_group_that_does_not_fit_is_refused_with_the_layer_and_the_nearest_that_does() -> None:
    with pytest.raises(InvalidRequest) as caught:
        candidates({"stem": "w4g16a8"}, target=WITH_GROUPS)
    expected = "Group size 16 of w4g16 does not fit layer 'stem': its output channels read 27 inputs each."
    assert str(caught.value) == f"{expected} The nearest group size that divides them is 9."


def test_a_group_has_to_fit_only_the_layers_that_may_take_it() -> None:
    found = candidates({"stem": "w8a8", "head": ["w4g16a8", "float"]}, ["w4g24a8"], WITH_GROUPS)
    assert found["head"] == ("w4g16a8", "float")
    assert found["blocks.0.conv1"] == ("w4g24a8",)
    with pytest.raises(InvalidRequest, match="does not fit layer 'head': its output channels read 16 inputs each"):
        candidates({"stem": "w8a8"}, ["w4g24a8"], WITH_GROUPS)


REFUSED: list[tuple[Any, str]] = [
    (["w4a8", "w99a8"], "Unknown scheme 'w99a8'. Expected 'float' or formats such as 'w4a8'"),
    (
        ["w4g32a8"],
        "weight groups (w4g32) are not supported by target onnxruntime-cpu yet. Candidates that can run: w2a8,",
    ),
    (["w4g32a8"], "w6a8, w8a8, float."),
    (["w4a8", "a4", "w8a3"], "a4 is not supported by target onnxruntime-cpu yet: a layer needs a weight"),
    (
        ["w4a8", "a4", "w8a3"],
        "; activation format a3 is not supported by target onnxruntime-cpu yet (static or per token, bits: 4, 5, 6,",
    ),
    ([], "schemes is empty: name at least one candidate, such as 'w8a8'."),
    ("", "schemes is empty"),
    ([8], "A scheme is text such as 'w4a8' or 'float', not int."),
    (8, "schemes is a list such as ['w4a8', 'w8a8'], not 8."),
]


@pytest.mark.parametrize(("schemes", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_candidates_that_cannot_run_are_refused_with_the_reason(schemes: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        candidates(None, schemes)
    assert message in str(caught.value)


@pytest.mark.parametrize(("schemes", "message"), REFUSED[:6], ids=lambda value: str(value)[:30])
def test_schemes_in_a_rule_are_refused_alike(schemes: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        candidates({"head": schemes})
    assert message in str(caught.value)


def test_a_rule_may_hold_a_scheme_object() -> None:
    assert candidates({"head": Scheme.parse("w6a8")})["head"] == ("w6a8",)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("head",)], "A rule is a pair (pattern, scheme or schemes), not ('head',)."),
        ([{"head": "float"}], "A rule is a pair (pattern, scheme or schemes), not {'head': 'float'}."),
        (["head"], "A rule is a pair (pattern, scheme or schemes), not 'head'."),
        ({3: "float"}, "A rule is a pair (pattern, scheme or schemes), not (3, 'float')."),
        ({"head": None}, "A rule is a pair (pattern, scheme or schemes), not ('head', None)."),
        ({"head": 8}, "A rule is a pair (pattern, scheme or schemes), not ('head', 8)."),
        ("head=float", "rules are pairs (pattern, scheme or schemes) or a table of them, not 'head=float'."),
        (5, "rules are pairs (pattern, scheme or schemes) or a table of them, not 5."),
    ],
    ids=repr,
)
def test_rules_that_are_no_pairs_are_refused(rules: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        candidates(rules)
    assert str(caught.value) == message
