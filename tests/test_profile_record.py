"""A profile predicts what a loop over its entries adds up, and its file is whole, equal, or refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from quantkit.errors import CorruptFile, InvalidRequest, QuantkitError
from quantkit.formats import Scheme
from quantkit.plan import Layer, Plan, Profile, SiteRecord, average_bits
from quantkit.plan.operations import Operation
from tests.test_latency import TABLE

LAYERS = {
    "stem": Layer("stem", "conv2d", (4, 3, 3, 3), 432, 500, 1, ("input",)),
    "body": Layer("body", "conv2d", (4, 4, 3, 3), 576, 900, 2, ("stem", "input")),
    "head": Layer("head", "linear", (10, 4), 80, 40, 1, ("body",), reason="reads two sites"),
}
SITES = {
    "input": SiteRecord("input", 192, ("stem", "body")),
    "stem": SiteRecord("stem", 256, ("body",)),
    "body": SiteRecord("body", 64, ("head",)),
}
WEIGHT_FORMATS, SITE_FORMATS = ("w2", "w4", "w8"), ("a4", "a8", "a6")
ENTRIES = (
    *((layer, fmt) for layer in ("stem", "body") for fmt in WEIGHT_FORMATS),
    *((site, fmt) for site in ("input", "stem") for fmt in SITE_FORMATS),
)


def profile(seed: int = 0) -> Profile:
    """A profile with random damages. Sites are named as the layers that make them, as in real models; the site
    ``body`` was never measured, the layer ``head`` stays float.
    """
    factor = np.random.default_rng(seed).normal(size=(len(ENTRIES), 5))
    gram = factor @ factor.T
    return Profile(
        layers=LAYERS,
        sites=SITES,
        schemes=("w2a8", "w4a8", "w8a8"),
        entries=ENTRIES,
        damage=gram.diagonal() / 2,
        gram=gram,
        other_bytes=72,
        float_bytes=432 + 576 + 80 + 72,
        target="onnxruntime-cpu",
        same_scheme=(("stem", "body"),),
        candidates={"stem": ("w2a8", "w4a8"), "body": ("w8a8",)},
        provenance={"seed": seed, "rounded": {"stem": ["w2", "w4"]}, "inputs": "plain"},
        operations=(
            Operation("stem", "layer", ("input",), ("stem",), codes_output=True),
            Operation("body", "layer", ("stem", "input"), ("body",), codes_output=True),
        ),
        latency=TABLE,
    )


PROFILE = profile()


def damage_by_loops(measured: Profile, chosen: set[tuple[str, str]]) -> float:
    """Damages alone, and each pair of chosen entries once."""
    total = 0.0
    for k, entry in enumerate(measured.entries):
        if entry in chosen:
            total += float(measured.damage[k])
            total += sum(float(measured.gram[k, j]) for j in range(k) if measured.entries[j] in chosen)
    return total


weight_choice = st.fixed_dictionaries({}, optional={n: st.sampled_from(WEIGHT_FORMATS) for n in ("stem", "body")})
site_choice = st.fixed_dictionaries({n: st.sampled_from([*SITE_FORMATS, "float"]) for n in ("input", "stem")})


@given(seed=st.integers(0, 5), weights=weight_choice, sites=site_choice)
def test_predicted_damage_is_the_sum_over_entries_and_pairs(
    seed: int, weights: dict[str, str], sites: dict[str, str]
) -> None:
    measured = profile(seed)
    schemes = {**weights, "head": "float"}
    chosen = {*weights.items(), *((site, fmt) for site, fmt in sites.items() if fmt != "float")}
    assert measured.predict(schemes, sites) == pytest.approx(damage_by_loops(measured, chosen), abs=1e-9)


@pytest.mark.parametrize(
    ("schemes", "sites"),
    [
        ({}, {"input": "a8", "stem": "a8"}),
        ({"stem": "float", "body": "float"}, {"input": "a8", "stem": "a8"}),
        ({"stem": "w4", "body": "w2"}, {"input": "a8", "stem": "a8"}),
        ({"stem": "w4a4", "body": "w2a4"}, {"input": "a4", "stem": "a4"}),
        ({"stem": "w4a6"}, {"input": "a6", "stem": "a8"}),
        ({"stem": "float", "body": "w8a6"}, {"input": "a6", "stem": "a6"}),
    ],
    ids=str,
)
def test_sites_not_given_take_their_consumers_format_or_the_widest(
    schemes: dict[str, str], sites: dict[str, str]
) -> None:
    assert PROFILE.site_formats({name: Scheme.parse(text) for name, text in schemes.items()}) == sites
    assert PROFILE.predict(schemes) == PROFILE.predict(schemes, sites)
    weights = {(name, text[:2]) for name, text in schemes.items() if text != "float"}
    assert PROFILE.predict(schemes) == pytest.approx(damage_by_loops(PROFILE, weights | set(sites.items())))


@pytest.mark.parametrize(
    ("schemes", "sites", "message"),
    [
        ({"steam": "w4a8"}, None, "The profile has no layer 'steam'. Did you mean 'stem'"),
        ({"stem": "w3a8"}, None, "w3 was not profiled for 'stem'; profiled: w2, w4, w8."),
        ({"head": "w4a8"}, None, "w4 was not profiled for 'head'; profiled: none."),
        ({"stem": "w4a5"}, None, "a5 was not profiled for 'input'; profiled: a4, a8, a6."),
        ({"stem": "w4a8"}, {"body": "a8"}, "a8 was not profiled for 'body'; profiled: none."),
        ({"stem": "w99"}, None, "Unknown scheme 'w99'."),
    ],
)
def test_what_was_not_profiled_is_refused_with_what_was(
    schemes: dict[str, str], sites: dict[str, str] | None, message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        PROFILE.predict(schemes, sites)
    assert message in str(caught.value)


def test_bytes_and_bits_of_layers_are_those_counted_by_hand() -> None:
    stem, head = LAYERS["stem"], LAYERS["head"]
    assert (stem.weights, head.weights) == (108, 40)
    assert stem.weight_bytes(Scheme.parse("w4a8")) == 54 + 4 * 4
    assert head.weight_bytes(Scheme()) == head.weight_bytes(Scheme.parse("a8")) == 80  # left as the model stores it
    assert average_bits(LAYERS, 73) == 8 * 73 / (108 + 144 + 40)


def test_a_profile_comes_back_equal_and_saves_to_the_same_bytes(tmp_path: Path) -> None:
    first = PROFILE.save(tmp_path / "new" / "first").read_bytes()
    loaded = Profile.load(tmp_path / "new" / "first")
    for name in ("layers", "sites", "schemes", "entries", "other_bytes", "float_bytes", "target", "same_scheme"):
        assert getattr(loaded, name) == getattr(PROFILE, name)
    assert (loaded.candidates, loaded.provenance) == (PROFILE.candidates, PROFILE.provenance)
    assert (loaded.operations, loaded.latency) == (PROFILE.operations, PROFILE.latency)
    assert np.array_equal(loaded.damage, PROFILE.damage) and np.array_equal(loaded.gram, PROFILE.gram)
    assert loaded == PROFILE and list(loaded.layers) == list(LAYERS)
    assert loaded.save(tmp_path / "second").read_bytes() == first == PROFILE.save(tmp_path / "third").read_bytes()


@pytest.mark.parametrize("laid_out", [np.asfortranarray, lambda a: np.repeat(np.repeat(a, 2, 0), 2, 1)[::2, ::2]])
def test_arrays_come_back_whatever_their_layout_in_memory(
    tmp_path: Path, laid_out: Callable[[np.ndarray], np.ndarray]
) -> None:
    lopsided = np.arange(len(ENTRIES) ** 2, dtype=float).reshape(len(ENTRIES), -1)
    damage = np.arange(2.0 * len(ENTRIES))[::2]
    measured = replace(PROFILE, gram=laid_out(lopsided), damage=damage)
    loaded = Profile.load(measured.save(tmp_path / "profile"))
    assert loaded.gram.tolist() == lopsided.tolist()
    assert loaded.damage.tolist() == [2.0 * k for k in range(len(ENTRIES))]
    assert loaded.digest() == measured.digest()


CHANGES: dict[str, Any] = {
    "layers": LAYERS | {"stem": replace(LAYERS["stem"], macs=501)},
    "sites": SITES | {"stem": replace(SITES["stem"], consumers=())},
    "schemes": ("w2a8", "w4a8"),
    "entries": ENTRIES[::-1],
    "damage": PROFILE.damage + 1e-12,
    "gram": PROFILE.gram * (1 + 1e-12),
    "other_bytes": 73,
    "float_bytes": 1,
    "target": "another",
    "same_scheme": (),
    "candidates": {},
    "provenance": {"seed": 1},
}


@pytest.mark.parametrize("field", CHANGES)
def test_every_part_of_a_profile_counts_in_its_digest_and_in_equality(field: str) -> None:
    changed = replace(PROFILE, **{field: CHANGES[field]})
    assert changed.digest() != PROFILE.digest()
    assert changed != PROFILE
    assert profile() == PROFILE and profile().digest() == PROFILE.digest()


def refusal(path: Path) -> QuantkitError | None:
    """What loading this file raises; None when it loads."""
    try:
        Profile.load(path)
    except QuantkitError as error:
        assert repr(str(path)) in str(error)
        return error
    return None


def assert_corrupt(error: QuantkitError | None, *words: str) -> None:
    assert type(error) is CorruptFile
    assert "is not a complete quantkit profile (" in str(error)
    assert str(error).endswith("). Run `quantkit profile` again.")
    assert [word for word in words if word not in str(error)] == []


def test_a_profile_cut_off_anywhere_is_corrupt(tmp_path: Path) -> None:
    path = PROFILE.save(tmp_path / "profile")
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        assert_corrupt(refusal(path))


def test_a_profile_with_any_byte_of_its_header_changed_loads_or_is_corrupt(tmp_path: Path) -> None:
    path = PROFILE.save(tmp_path / "profile")
    whole = path.read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    with path.open("r+b", buffering=0) as file:
        for k in range(header_bytes):
            for byte in (b"\xff", b'"'):
                os.pwrite(file.fileno(), byte, k)
                error = refusal(path)
                assert error is None or type(error) is CorruptFile, (k, byte)
                refused += error is not None
            os.pwrite(file.fileno(), whole[k : k + 1], k)
    assert refused > 1.8 * header_bytes


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(str(path), framework="numpy") as file:
        return json.loads(file.metadata()["quantkit_profile"])


def with_header(path: Path, header: Any, **arrays: np.ndarray) -> Path:
    """A profile file with this JSON as its header."""
    tensors = {"damage": PROFILE.damage, "gram": PROFILE.gram} | arrays
    save_file(tensors, str(path), metadata={"quantkit_profile": json.dumps(header)})
    return path


def places(data: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside nested tables and lists."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*way, key)
        yield from places(value, (*way, key))


def test_a_header_with_a_value_of_another_type_anywhere_is_corrupt(tmp_path: Path) -> None:
    header = header_of(PROFILE.save(tmp_path / "profile"))
    ways = [way for way in places(header) if way[0] != "provenance" and "notes" not in way[:-1]]
    assert len(ways) > 100
    for way in [*ways, ("provenance",)]:
        for value in (None, True, 3, 1.5, "x", [1], {"x": 1}):
            edited = json.loads(json.dumps(header))
            inner = edited
            for key in way[:-1]:
                inner = inner[key]
            same = type(inner[way[-1]]) is type(value) or (type(inner[way[-1]]) is float and value == 3)
            if same or (way == ("latency",) and value is None):
                continue
            inner[way[-1]] = value
            assert_corrupt(refusal(with_header(tmp_path / "edited", edited)))


@pytest.mark.parametrize("header", [None, 3, "x", [], {}, ["version"]], ids=repr)
def test_a_header_that_is_no_table_is_corrupt(tmp_path: Path, header: Any) -> None:
    assert_corrupt(refusal(with_header(tmp_path / "profile", header)))


@pytest.mark.parametrize("key", [*sorted(CHANGES.keys() - {"damage", "gram"}), "version"])
def test_a_header_that_lacks_a_key_is_corrupt_and_the_key_is_named(tmp_path: Path, key: str) -> None:
    header = header_of(PROFILE.save(tmp_path / "profile"))
    del header[key]
    assert_corrupt(refusal(with_header(tmp_path / "edited", header)), f"'{key}'")


def test_another_version_and_unknown_keys_are_named(tmp_path: Path) -> None:
    header = header_of(PROFILE.save(tmp_path / "profile"))
    later, more = header | {"version": 1}, header | {"comment": "mine"}
    assert_corrupt(refusal(with_header(tmp_path / "later", later)), "version 1, this quantkit reads 2")
    assert_corrupt(refusal(with_header(tmp_path / "more", more)), "'comment'")


def test_arrays_that_do_not_belong_to_the_entries_are_corrupt(tmp_path: Path) -> None:
    header, count = header_of(PROFILE.save(tmp_path / "profile")), len(ENTRIES)
    short = with_header(tmp_path / "short", header, damage=np.zeros(count - 1))
    assert_corrupt(refusal(short), f"({count - 1},) and ({count}, {count}) for {count} entries")
    flat = with_header(tmp_path / "flat", header, gram=np.zeros(count * count))
    assert_corrupt(refusal(flat), f"({count},) and ({count * count},) for {count} entries")


def test_foreign_files_are_corrupt(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(3)}, str(tmp_path / "weights"))
    assert_corrupt(refusal(tmp_path / "weights"), "it lacks 'quantkit_profile'")
    save_file({"damage": PROFILE.damage}, str(tmp_path / "half"), metadata={"quantkit_profile": "{}"})
    assert_corrupt(refusal(tmp_path / "half"), "gram")
    assert_corrupt(refusal(Plan({"stem": Scheme()}).save(tmp_path / "plan.json")))
    with pytest.raises(CorruptFile, match="is not valid JSON"):
        Plan.load(PROFILE.save(tmp_path / "profile"))


def test_a_profile_that_cannot_be_read_or_written_is_a_bad_request(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InvalidRequest, match=r"Cannot read the profile .*absent': No such file"):
        Profile.load(tmp_path / "absent")
    with pytest.raises(InvalidRequest, match="Cannot read the profile"):
        Profile.load(tmp_path)
    with pytest.raises(InvalidRequest, match=r"Cannot write .*inside"):
        PROFILE.save(tmp_path / "file" / "inside")
