"""A plan comes back from disk as it was, is known by its decision alone, and damaged or mistyped files are refused."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import CorruptFile, InvalidRequest, QuantkitError
from quantkit.formats import Scheme
from quantkit.plan import Plan, canonical_json, digest_of
from tests.scheme_grammar import ACTIVATIONS, SCHEMES

PLAN = Plan(
    schemes={"stem": Scheme.parse("w8a8"), "blocks.0": Scheme.parse("w4g64za8d"), "head": Scheme()},
    sites={"input": "a8", "stem": "float"},
    size_bytes=1234,
    total_bytes=1300,
    average_bits=4.25,
    predicted_damage=0.0625,
    why={"stem": "4 bits would add 0.3 damage", "head": "überall float"},
    provenance={"budget": "4 bits", "seed": 0, "gap": 1e-6, "limits": {"size": 1300}, "proven": True},
)

names = st.text("abcä.0 ", min_size=1, max_size=5)
plans = st.builds(
    Plan,
    schemes=st.dictionaries(names, st.sampled_from(SCHEMES).map(Scheme.parse), max_size=4),
    sites=st.dictionaries(names, st.sampled_from(["float", *ACTIVATIONS]), max_size=3),
    size_bytes=st.integers(0, 10**12),
    total_bytes=st.integers(0, 10**12),
    average_bits=st.floats(0, 32),
    predicted_damage=st.none() | st.floats(0, 1e300),
    why=st.dictionaries(names, st.text(max_size=8), max_size=3),
    provenance=st.dictionaries(names, st.integers() | st.text(max_size=5) | st.lists(st.booleans()), max_size=3),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@given(plan=plans)
def test_a_plan_comes_back_equal_and_saves_to_the_same_bytes(folder: Path, plan: Plan) -> None:
    first = plan.save(folder / "first.json").read_bytes()
    loaded = Plan.load(folder / "first.json")
    assert loaded == plan
    assert list(loaded.schemes) == list(plan.schemes)
    assert loaded.digest() == plan.digest()
    assert loaded.save(folder / "second.json").read_bytes() == first == plan.save(folder / "third.json").read_bytes()


def test_the_file_is_json_that_a_person_can_read_and_edit(tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "new folder" / "plan.json")
    data = json.loads(path.read_text())
    assert data["schemes"] == {"stem": "w8a8", "blocks.0": "w4g64za8d", "head": "float"}
    assert data["sites"] == {"input": "a8", "stem": "float"}
    assert (data["version"], data["size_bytes"], data["predicted_damage"]) == (1, 1234, 0.0625)
    edited = path.read_text().replace('"w4g64za8d"', '" W3A8 "').replace('"a8"', '"A4 "')
    path.write_text(edited)
    schemes, sites = PLAN.schemes | {"blocks.0": Scheme.parse("w3a8")}, PLAN.sites | {"input": "a4"}
    assert Plan.load(path) == replace(PLAN, schemes=schemes, sites=sites)


def test_a_plan_with_schemes_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"version": 1, "schemes": {"fc": "w4a8"}}')
    assert Plan.load(tmp_path / "plan.json") == Plan({"fc": Scheme.parse("w4a8")})


@given(one=plans, other=plans)
def test_two_plans_have_one_digest_exactly_when_they_decide_the_same(one: Plan, other: Plan) -> None:
    same = {n: str(s) for n, s in one.schemes.items()} == {n: str(s) for n, s in other.schemes.items()}
    assert (one.digest() == other.digest()) == (same and one.sites == other.sites)


@pytest.mark.parametrize(
    "change",
    [
        {"size_bytes": 1},
        {"total_bytes": 1},
        {"average_bits": 1.0},
        {"predicted_damage": None},
        {"why": {}},
        {"provenance": {}},
        {"schemes": dict(reversed(PLAN.schemes.items()))},
        {"sites": dict(reversed(PLAN.sites.items()))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_the_decision_leaves_the_digest(change: dict[str, Any]) -> None:
    assert replace(PLAN, **change).digest() == PLAN.digest()


@pytest.mark.parametrize(
    "change",
    [
        {"schemes": PLAN.schemes | {"stem": Scheme.parse("w7a8")}},
        {"schemes": PLAN.schemes | {"stem": Scheme.parse("w8a8d")}},
        {"schemes": PLAN.schemes | {"more": Scheme()}},
        {"schemes": {"stem": PLAN.schemes["stem"]}},
        {"sites": PLAN.sites | {"input": "a4"}},
        {"sites": {}},
    ],
    ids=["width", "activation", "a layer more", "layers less", "site", "sites less"],
)
def test_every_change_of_the_decision_changes_the_digest(change: dict[str, Any]) -> None:
    assert replace(PLAN, **change).digest() != PLAN.digest()


def test_the_digest_is_that_of_sorted_json_so_that_saved_weights_still_find_their_plan() -> None:
    decision = '[{"blocks.0":"w4g64za8d","head":"float","stem":"w8a8"},{"input":"a8","stem":"float"}]'
    assert PLAN.digest() == hashlib.sha256(decision.encode()).hexdigest()[:16]
    assert canonical_json({"b": [1, None], "a": "x y"}) == '{"a":"x y","b":[1,null]}'
    assert digest_of({"b": 1, "a": 2}) == digest_of({"a": 2, "b": 1}) != digest_of({"b": 2, "a": 1})


def test_a_plain_mapping_becomes_a_plan_and_a_plan_stays_itself() -> None:
    assert Plan.of({"fc": "w4a8", "head": Scheme()}) == Plan({"fc": Scheme.parse("w4a8"), "head": Scheme()})
    assert Plan.of(PLAN) is PLAN
    with pytest.raises(InvalidRequest, match=r"'fc': Unknown scheme 'w99'\. Expected"):
        Plan.of({"fc": "w99"})
    with pytest.raises(InvalidRequest, match=r"A plan is a Plan or a mapping layer name -> scheme, not 'w4a8'\."):
        Plan.of("w4a8")  # type: ignore[arg-type]


def test_a_plan_prints_a_row_per_layer_with_its_reason() -> None:
    head, *rows = str(PLAN).splitlines()
    assert head == "1,234 bytes of weights, 4.250 bits on average"
    assert [row.split(maxsplit=2) for row in rows] == [
        ["stem", "w8a8", "4 bits would add 0.3 damage"],
        ["blocks.0", "w4g64za8d"],
        ["head", "float", "überall float"],
    ]
    assert len({row.index(scheme) for row, scheme in zip(rows, ("w8a8", "w4g64za8d", "float"), strict=True)}) == 1


def refusal(path: Path, content: str | bytes | None = None) -> QuantkitError | None:
    """What loading a file raises, with this content if there is one; None when it loads."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        Plan.load(path)
    except QuantkitError as error:
        assert repr(str(path)) in str(error)
        return error
    return None


def test_a_plan_cut_off_anywhere_is_corrupt(tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "plan.json")
    for length in reversed(range(path.stat().st_size - 1)):  # the last byte is the newline after the closing brace
        os.truncate(path, length)
        error = refusal(path)
        assert type(error) is CorruptFile and "is not valid JSON" in str(error), length
    assert str(error).endswith(": the plan is damaged or was cut off.")


def test_a_plan_with_any_byte_changed_loads_or_is_refused_but_never_crashes(tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "plan.json")
    whole = path.read_bytes()
    refused = 0
    with path.open("r+b", buffering=0) as file:
        for k in range(len(whole)):
            for byte in (b"\0", b"\xff", b'"', b"}", b"9"):
                os.pwrite(file.fileno(), byte, k)
                refused += refusal(path) is not None
            os.pwrite(file.fileno(), whole[k : k + 1], k)
    assert refused > 2.5 * len(whole)


FOREIGN: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "is not valid JSON"),
    "image": (b"\x89PNG\r\n\x1a\n", "is not valid JSON"),
    "utf-16": ('{"version": 1}'.encode("utf-16"), "is not valid JSON"),
    "deep": ('{"schemes": ' + "[" * 100_000, "is not valid JSON"),
    "NaN": ('{"version": 1, "schemes": {}, "predicted_damage": NaN}', "(NaN is not a number in JSON)"),
    "infinity": ('{"version": 1, "schemes": {}, "average_bits": -Infinity}', "(-Infinity is not a number in JSON)"),
    "number": ("3", "is not a quantkit plan: it has no table 'schemes' (layer name -> scheme)."),
    "list": ("[]", "is not a quantkit plan"),
    "no schemes": ('{"version": 1}', "is not a quantkit plan"),
    "schemes a list": ('{"version": 1, "schemes": ["w4a8"]}', "is not a quantkit plan"),
    "no version": ('{"schemes": {}}', "is not a plan of version 1; allocate again."),
    "later version": ('{"version": 2, "schemes": {}}', "is not a plan of version 1; allocate again."),
    "version true": ('{"version": true, "schemes": {}}', "is not a plan of version 1"),
    "version text": ('{"version": "1", "schemes": {}}', "is not a plan of version 1"),
}


@pytest.mark.parametrize(("content", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_a_file_that_is_no_plan_is_corrupt(tmp_path: Path, content: str | bytes, message: str) -> None:
    error = refusal(tmp_path / "plan.json", content)
    assert type(error) is CorruptFile
    assert message in str(error)


def test_a_plan_that_cannot_be_read_is_a_bad_request(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"Cannot read the plan .*absent\.json': No such file or directory\."):
        Plan.load(tmp_path / "absent.json")
    with pytest.raises(InvalidRequest, match=r"Cannot read the plan .*: Is a directory\."):
        Plan.load(tmp_path)


# One value of every JSON type, and the types each key of a plan takes.
VALUES: dict[str, Any] = {"null": None, "boolean": True, "integer": 3, "real": 1.5, "text": "x", "list": [1]}
VALUES |= {"empty list": [], "table": {"stem": 1}, "huge": 10**400}
TAKES = {
    "sites": set(),
    "size_bytes": {"integer", "huge"},
    "total_bytes": {"integer", "huge"},
    "average_bits": {"integer", "real", "huge"},
    "predicted_damage": {"integer", "real", "huge", "null"},
    "why": set(),
    "provenance": {"table"},
}
EXPECTED = {"average_bits": "float", "predicted_damage": "float | None", "provenance": "dict[str, Any]"}
EXPECTED |= {"size_bytes": "int", "total_bytes": "int", "sites": "dict[str, str]", "why": "dict[str, str]"}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("key", TAKES)
def test_a_key_with_a_value_of_another_type_is_refused_by_name(tmp_path: Path, key: str, kind: str) -> None:
    edited = json.loads(PLAN.save(tmp_path / "plan.json").read_text()) | {key: VALUES[kind]}
    error = refusal(tmp_path / "plan.json", json.dumps(edited))
    if kind in TAKES[key]:
        assert error is None
        return
    assert type(error) is InvalidRequest
    assert f"{key} is {VALUES[kind]!r:.60}, expected {EXPECTED[key]}." in str(error)


SCHEME_LIKE = [None, True, 4, 1.5, [], ["w4a8"], {}, {"w": 4}, "", "w99", "a8w4"]


@pytest.mark.parametrize("value", SCHEME_LIKE, ids=repr)
def test_a_layer_without_a_readable_scheme_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    content = {"version": 1, "schemes": {"stem": "w4a8", "head": value}}
    error = refusal(tmp_path / "plan.json", json.dumps(content))
    assert type(error) is InvalidRequest
    reason = f"Unknown scheme {value!r}" if isinstance(value, str) else "A scheme is text such as 'w4a8' or 'float'"
    assert f": 'head': {reason}" in str(error)


@pytest.mark.parametrize("value", [*SCHEME_LIKE, "w4", "w4a8"], ids=repr)
def test_a_site_without_an_activation_format_is_refused(tmp_path: Path, value: Any) -> None:
    content = {"version": 1, "schemes": {"stem": "w4a8"}, "sites": {"input": value}}
    error = refusal(tmp_path / "plan.json", json.dumps(content))
    assert type(error) is InvalidRequest
    if value in ("w4", "w4a8"):
        assert f"site 'input' is given {value}; a site has no weight: 'a8', say, or 'float'." in str(error)
    else:
        assert ("'input': Unknown scheme" if isinstance(value, str) else "sites is {'input': ") in str(error)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("scheme", "Unknown key 'scheme' in the plan "),
        ("size_byte", "Did you mean 'size_bytes'"),
        ("comment", "Unknown key 'comment'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(tmp_path: Path, key: str, message: str) -> None:
    error = refusal(tmp_path / "plan.json", json.dumps({"version": 1, "schemes": {}, key: 3}))
    assert type(error) is InvalidRequest
    assert message in str(error)


def test_a_failed_save_keeps_the_plan_that_was_there(tmp_path: Path) -> None:
    before = PLAN.save(tmp_path / "plan.json").read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(PLAN, predicted_damage=float("nan")).save(tmp_path / "plan.json")
    with pytest.raises(InvalidRequest, match="Cannot write "):
        PLAN.save(tmp_path / "plan.json" / "below a file.json")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("plan.json", before)]
