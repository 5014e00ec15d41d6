"""What the onnxruntime target runs, against a list written by hand, and how it says no."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme
from quantkit.targets import Target, target_names
from tests.scheme_grammar import SCHEMES

ACTS = ("", "a4", "a5", "a6", "a7", "a8", "a4d", "a5d", "a6d", "a7d", "a8d")
RUNS = {"float", *(f"w{weight}{act}" for weight in range(2, 9) for act in ACTS)}
CODED = r"w([2-8](g\d+)?z?(s[fi]\d+)?|fp8(e5m2)?(g\d+)?(s[fi]\d+)?|nvfp4|mxfp4)"
RUNS |= {"w16"} | {text for text in SCHEMES if re.fullmatch(CODED, text)}  # weights alone, expanded at load


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.load("onnxruntime-cpu")


def test_exactly_the_listed_schemes_of_the_whole_grammar_run(target: Target) -> None:
    assert {text for text in SCHEMES if target.refusal(Scheme.parse(text)) is None} == RUNS


def test_every_refusal_names_the_target_once(target: Target) -> None:
    reasons = [target.refusal(Scheme.parse(text)) for text in SCHEMES if text not in RUNS]
    assert {str(reason).count("not supported by target onnxruntime-cpu yet") for reason in reasons} == {1}
    assert not any("?" in str(reason) for reason in reasons)


NO = "not supported by target onnxruntime-cpu yet"
REASONS = [
    ("a8", f"a8 is {NO}: a layer needs a weight format"),
    ("w16a8", f"w16a8 is {NO}: float16 weights compute in float, as w16 alone"),
    ("wfp8a8", f"weight format wfp8 is {NO} (bits: 2, 3, 4, 5, 6, 7, 8)"),
    ("w4g32a8", f"weight groups (w4g32) are {NO}"),
    ("w4za8", f"weight zero points (w4z) are {NO}"),
    ("w4sf16a8", f"f16 scales (w4sf16) are {NO}"),
    ("w4a3", f"activation format a3 is {NO} (static or per token, bits: 4, 5, 6, 7, 8)"),
    ("w4a3d", f"activation format a3d is {NO} (static or per token, bits: 4, 5, 6, 7, 8)"),
    ("w4a8g32", f"activation format a8g32 is {NO} (static or per token, bits: 4, 5, 6, 7, 8)"),
    ("w4afp8", f"activation format afp8 is {NO} (static or per token, bits: 4, 5, 6, 7, 8)"),
]


@pytest.mark.parametrize(("scheme", "reason"), REASONS, ids=[scheme for scheme, _ in REASONS])
def test_a_refusal_says_which_part_of_the_scheme_is_the_reason(target: Target, scheme: str, reason: str) -> None:
    assert target.refusal(Scheme.parse(scheme)) == reason


def test_a_target_without_float16_refuses_it(target: Target) -> None:
    reason = f"weight format w16 is {NO} (bits: 2, 3, 4, 5, 6, 7, 8, fp8, fp8e5m2, nvfp4, mxfp4)"
    assert replace(target, float16_weights=False).refusal(Scheme.parse("w16")) == reason


def test_the_simulation_runs_all_but_logarithms_groups_of_activations_and_static_fp8() -> None:
    simulation = Target.load("torch")
    found = {text for text in SCHEMES if simulation.refusal(Scheme.parse(text)) is None}
    assert found == {"float", "w16"} | {
        text for text in SCHEMES if re.fullmatch(rf"{CODED}(a[2-8]d?|afp8d|afp8e5m2d)?", text)
    }
    assert simulation.refusal(Scheme.parse("w4g128sf8afp8d")) is simulation.refusal(Scheme.parse("w4g64za8d")) is None
    bits = "bits: 2, 3, 4, 5, 6, 7, 8; per token: fp8, fp8e5m2"
    reason = f"activation format afp8 is not supported by target torch yet (static or per token, {bits})"
    assert simulation.refusal(Scheme.parse("w8afp8")) == reason


def test_a_target_that_quantizes_no_tokens_refuses_them(target: Target) -> None:
    static = replace(target, dynamic_layers=())
    reason = f"activation format a8d is {NO} (static, bits: 4, 5, 6, 7, 8)"
    assert static.refusal(Scheme.parse("w4a8d")) == reason
    assert target.refusal(Scheme.parse("w4a8d")) is None


def test_a_target_with_groups_and_zero_points_runs_them(target: Target) -> None:
    wider = replace(target, weight_groups=True, weight_zero_points=True, activation_bits=(4, 8))
    assert wider.refusal(Scheme.parse("w4g32zsf32a4")) is None
    assert wider.refusal(Scheme.parse("w4g32za4")) == f"f16 scales (w4g32z) are {NO}"
    assert replace(wider, weight_scales=("f32", "f16")).refusal(Scheme.parse("w4g32za4")) is None


def test_a_target_names_the_scales_it_stores(target: Target) -> None:
    narrower = replace(target, weight_only_scales=("f32",))
    assert narrower.refusal(Scheme.parse("w4g32z")) == f"f16 scales (w4g32z) are {NO}"
    assert narrower.refusal(Scheme.parse("w4g32zsf32")) is None


def test_a_target_of_integer_kernels_alone_needs_codes_to_read(target: Target) -> None:
    narrower = replace(target, weight_only=False)
    assert narrower.refusal(Scheme.parse("w4")) == f"w4 is {NO}: a layer needs an activation format"
    assert narrower.refusal(Scheme.parse("w4a8")) is None


def test_the_default_schemes_are_the_widths_with_a_kernel_from_narrow_to_wide(target: Target) -> None:
    assert target.default_schemes == ("w2a8", "w3a8", "w4a8", "w5a8", "w6a8", "w8a8")
    assert set(target.output_coded) == {"conv1d", "conv2d", "conv3d"}
    assert set(target.layers) == {"conv1d", "conv2d", "conv3d", "linear", "matmul"}


def test_groups_and_zero_points_run_where_activations_stay_float(target: Target) -> None:
    assert target.refusal(Scheme.parse("w3g16z")) is None
    narrower = replace(target, weight_only_groups=False)
    assert narrower.refusal(Scheme.parse("w3g16")) == f"weight groups (w3g16) are {NO}"
    assert narrower.refusal(Scheme.parse("w3z")) == f"weight zero points (w3z) are {NO}"


def test_a_target_is_loaded_by_name_or_passed_through(target: Target) -> None:
    assert target_names() == ["onnxruntime-cpu", "torch"]
    assert target.name == "onnxruntime-cpu"
    assert Target.load(target) is target


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "onnxruntime",
            "Unknown target 'onnxruntime'; known: onnxruntime-cpu, torch. Did you mean 'onnxruntime-cpu'?",
        ),
        ("tpu", "Unknown target 'tpu'; known: onnxruntime-cpu, torch."),
        ("../targets/onnxruntime-cpu", "Unknown target '../targets/onnxruntime-cpu'; known: onnxruntime-cpu, torch."),
        (None, "Unknown target None; known: onnxruntime-cpu, torch."),
        (["onnxruntime-cpu"], "Unknown target ['onnxruntime-cpu']; known: onnxruntime-cpu, torch."),
    ],
)
def test_an_unknown_target_is_refused_with_the_known_ones(name: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Target.load(name)
    assert str(caught.value).startswith(message)
