"""The layout check passes here, and fails on small trees that break one rule each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.check_layout import MAX_FILE_LINES, MAX_FUNCTION_LINES, check, code_lines, main


def written(root: Path, files: dict[str, str]) -> Path:
    """A tree with these files; the package exists even when they are all outside it."""
    for path, source in {"quantkit/__init__.py": "", **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(source)
    return root


def test_this_repository_is_in_order(repo: Path) -> None:
    assert check(repo) == []


def test_an_orderly_tree_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "quantkit/__init__.py": "from quantkit.stages import quantize",
        "quantkit/errors.py": "",
        "quantkit/formats.py": "from quantkit.errors import InvalidRequest",
        "quantkit/plan.py": "from quantkit import formats",
        "quantkit/allocation/__init__.py": "",
        "quantkit/allocation/costs.py": "from ..plan import Plan",
        "quantkit/allocation/solve.py": "from quantkit.store import Store\n\nfrom . import costs",
        "quantkit/store.py": "",
        "quantkit/sensitivity.py": "",
        "quantkit/report/__init__.py": "",
        "quantkit/report/tables.py": "import quantkit.sensitivity",
        "quantkit/stages.py": "import torch\n\n\ndef late():\n    from quantkit.backends.onnxruntime import writer",
        "quantkit/backends/onnxruntime/__init__.py": "",
        "quantkit/backends/onnxruntime/writer.py": "from quantkit.plan import Plan",
    }
    assert main([str(written(tmp_path, files))]) == 0
    assert "14 modules" in capsys.readouterr().out


UPWARDS = {
    "direct": ("quantkit/formats.py", "import quantkit.plan", "formats stands below plan"),
    "from": ("quantkit/program/trace.py", "from quantkit import stages", "program stands below stages"),
    "relative": ("quantkit/numbers/packing.py", "from ..program import trace", "numbers stands below program"),
    "in a function": (
        "quantkit/sensitivity/gram.py",
        "def late():\n    from quantkit.recipe import read",
        "sensitivity stands below recipe",
    ),
    "for types only": (
        "quantkit/backends/onnxruntime/writer.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from quantkit.cli import main",
        "backends stands below cli",
    ),
    "the face": ("quantkit/rounding/gptq.py", "from quantkit import quantize", "rounding stands below __init__"),
    "allocation": (
        "quantkit/allocation/solve.py",
        "from quantkit.program import trace",
        "allocation imports quantkit.program",
    ),
    "torch": ("quantkit/allocation/solve.py", "from torch import Tensor", "allocation imports torch"),
    "torch below": ("quantkit/plan.py", "import torch.nn", "plan imports torch"),
    "report on allocation": ("quantkit/report/plots.py", "import quantkit.allocation", "which only the stages may"),
    "report on backends": ("quantkit/report/html.py", "from ..backends import writer", "which only the stages may"),
    "no place": ("quantkit/helpers.py", "import quantkit.errors", "quantkit/helpers has no place in the import order"),
}


@pytest.mark.parametrize(("path", "source", "message"), UPWARDS.values(), ids=UPWARDS.keys())
def test_an_import_against_the_order_fails(tmp_path: Path, path: str, source: str, message: str) -> None:
    names = "errors formats plan stages recipe cli program/__init__ program/trace".split()
    others = {f"quantkit/{name}.py": "" for name in names}
    (violation,) = check(written(tmp_path, {**others, path: source}))
    assert violation.startswith(f"{path}:")
    assert message in violation


def test_a_circle_is_named_once(tmp_path: Path) -> None:
    files = {
        "quantkit/program/__init__.py": "",
        "quantkit/program/trace.py": "from quantkit.program.sites import Site",
        "quantkit/program/sites.py": "import quantkit.program.loop",
        "quantkit/program/loop.py": "def late():\n    from .trace import Program",
        "quantkit/runtime.py": "from quantkit.runtime import itself",
    }
    circle, itself = check(written(tmp_path, files))
    way = "quantkit.program.loop -> quantkit.program.trace -> quantkit.program.sites -> quantkit.program.loop"
    assert circle == f"quantkit/program/loop.py:2: import circle {way}, move what they share into a lower module"
    assert itself.startswith("quantkit/runtime.py:1: import circle quantkit.runtime -> quantkit.runtime, ")


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("folder", ["quantkit", "tests"])
def test_file_length(tmp_path: Path, folder: str, extra: int) -> None:
    root = written(tmp_path, {f"{folder}/errors.py": "pass\n" * (MAX_FILE_LINES + extra)})
    expected = [f"{folder}/errors.py:401: 401 lines, at most 400, split it: one idea per file"]
    assert check(root) == (expected if extra else [])


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("indent", ["", "    "], ids=["function", "method"])
def test_function_length_leaves_the_docstring_out(tmp_path: Path, indent: str, extra: int) -> None:
    head = "class Holder:\n" if indent else "\n"
    body = [
        "async def long():",
        '    """What.',
        "",
        "    Why.",
        '    """',
        *["    pass"] * (MAX_FUNCTION_LINES - 1 + extra),
    ]
    root = written(tmp_path, {"tools/long.py": head + "\n".join(indent + line for line in body)})
    advice = "move a step of it into a function of its own"
    expected = [f"tools/long.py:2: long has 41 lines without its docstring, at most 40, {advice}"]
    assert check(root) == (expected if extra else [])


QUANTIZERS = {
    "quantkit/program/__init__.py": "",
    "quantkit/numbers/quantizer.py": "class Quantizer: ...",
    "quantkit/numbers/uniform.py": (
        "from quantkit.numbers.quantizer import Quantizer\n\n\nclass Even(Quantizer): ...\n\n\nclass Plain: ...\n"
    ),
    "quantkit/numbers/kinds.py": (
        "from quantkit.numbers.uniform import Even, Plain\n\nEither = Even | Plain\nassert isinstance(1, Even)\n"
    ),
}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("isinstance(x, Even)", "Even"),
        ("isinstance(x, numbers.uniform.Even)", "Even"),
        ("isinstance(x, int | Even)", "Even"),
        ("not isinstance(x, (Plain, Quantizer))", "Quantizer"),
        ("isinstance(x, Either)", "Either"),
        ("issubclass(x, Even)", "Even"),
        ("type(x) is Even", "Even"),
        ("isinstance(x, Plain)", None),
        ("type(x) is Plain", None),
        ("x.kind == Even.kind", None),
    ],
)
def test_quantizers_are_told_apart_in_one_folder(tmp_path: Path, line: str, named: str | None) -> None:
    source = f"def tell(x):\n    return {line}\n"
    found = check(written(tmp_path, QUANTIZERS | {"quantkit/program/tape.py": source}))
    place = "quantkit/program/tape.py:2: asks whether a quantizer is"
    assert [message.startswith(f"{place} {named}, ") for message in found] == ([] if named is None else [True])


def test_a_pattern_tells_quantizers_apart_too(tmp_path: Path) -> None:
    source = "match 1:\n    case Even():\n        pass\n    case Plain():\n        pass\n"
    (message,) = check(written(tmp_path, QUANTIZERS | {"quantkit/program/tape.py": source}))
    assert message.startswith("quantkit/program/tape.py:2: asks whether a quantizer is Even, ")


MANY = {
    "function": ("def many(a, b, c, /, d, *, e, f, g): ...", 7),
    "stars": ("async def many(a, b, c, d, e, *args, **kwargs): ...", 7),
    "method": ("class Holder:\n    def many(self, a, b, c, d, e, f, g): ...", 7),
    "class method": ("class Holder:\n    @classmethod\n    def many(cls, a, b, c, d, e, f, g, h): ...", 8),
    "inside": ("def few():\n    def many(a, b, c, d, e, f, g): ...", 7),
    "a verb's name": ("class Holder:\n    def quantize(self, a, b, c, d, e, f, g): ...", 7),
    "self is left out": ("class Holder:\n    def many(self, a, b, c, d, e, f): ...", None),
    "kernel": ("@triton.jit\ndef many(a, b, c, d, e, f, g): ...", None),
    "tuned kernel": ("@triton.jit(debug=True)\ndef many(a, b, c, d, e, f, g): ...", None),
    "fields": (
        "class Holder:\n    a: int\n    b: int\n    c: int\n    d: int\n    e: int\n    f: int\n    g: int",
        None,
    ),
}


@pytest.mark.parametrize(("source", "count"), MANY.values(), ids=MANY.keys())
def test_parameters_are_counted(tmp_path: Path, source: str, count: int | None) -> None:
    root = written(tmp_path, {"quantkit/errors.py": source})
    found = check(root)
    assert [f" has {count} parameters, at most 6, " in message for message in found] == (
        [] if count is None else [True]
    )


def test_public_verbs_may_have_many_parameters(tmp_path: Path) -> None:
    source = "def verb(a, b, c, d, e, f, g): ...\n\n\ndef helper(a, b, c, d, e, f, g): ...\n"
    files = {"quantkit/__init__.py": "from quantkit.stages import verb", "quantkit/stages.py": source}
    (message,) = check(written(tmp_path, files))
    assert message.startswith("quantkit/stages.py:4: helper has 7 parameters")


def test_code_is_counted_without_what_explains_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = '''"""A module.

    Of one class.
    """

# a comment
class Holder:
    """Holds."""

    text = """not a docstring,
    which counts"""  # a comment behind code

    def held(self):
        """Return it."""
        return self.text
'''
    assert code_lines(source) == 5
    assert main([str(written(tmp_path, {"quantkit/errors.py": source}))]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "5 lines of code"


def test_the_command_tells_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(written(tmp_path, {"quantkit/cli.py": "", "quantkit/errors.py": "import quantkit.cli"}))]) == 1
    assert "errors stands below cli" in capsys.readouterr().out
    assert main([str(written(tmp_path / "many", {"quantkit/cli.py": MANY["function"][0]}))]) == 1
    assert "many has 7 parameters" in capsys.readouterr().out
    assert main([str(tmp_path / "elsewhere")]) == 1
    assert "pass the repository's root" in capsys.readouterr().err
