"""A recipe: the arguments of a run as a YAML file, read and checked before anything else happens.

Every error names the file, the line and the key. Paths of inputs are relative to the recipe's folder and may begin
with ``${QUANTKIT_DATA}`` or ``${QUANTKIT_DATA:-path}`` (the path counts where the variable is not set); ``output`` and
``workdir`` are relative to where the command runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantkit.errors import InvalidRequest, did_you_mean
from quantkit.targets import is_target_file

Keys = tuple[str, ...]

_TEXT, _NUMBER, _LIST, _MAP, _FLAG = (str,), (int,), (list, str), (dict,), (bool,)
_DATA: dict[str, tuple[type, ...]] = {
    "npz": _TEXT,
    "inputs": (str, list, dict),
    "select": (str, list),
    "preprocess": _TEXT,
    "python": _TEXT,
}
_TEXTS: dict[str, tuple[type, ...]] = {"text": _TEXT, "field": _TEXT, "tokenizer": _TEXT}
SECTIONS: dict[str, dict[str, tuple[type, ...]]] = {
    "model": {"python": _TEXT, "weights": _TEXT},
    "calibration": _DATA | _TEXTS,
    "example_inputs": _DATA | _TEXTS,
    "evaluate": _DATA | {"metric": _TEXT, "labels": _TEXT},
}
SETTINGS: dict[str, tuple[type, ...]] = {
    "budget": (str, dict),
    "schemes": _LIST,
    "rules": (dict, list),
    "first_last": _TEXT,
    "float_storage": _TEXT,
    "samples": _NUMBER,
    "loss": _TEXT,
    "target": _TEXT,
    "sensitivity": _TEXT,
    "solver": _TEXT,
    "effort": _TEXT,
    "rounding": _TEXT,
    "ranges": _TEXT,
    "transforms": _TEXT,
    "reconstruction": _TEXT,
    "correction": _TEXT,
    "reparameterization": _TEXT,
    "seed": _NUMBER,
    "memory": _TEXT,
}
# settings that a profile does not depend on
DECIDED_LATER = ("budget", "solver", "effort", "reconstruction", "correction", "reparameterization")
EXPORT: dict[str, tuple[type, ...]] = {"dynamic": _MAP, "external_data": _FLAG}
PLACES: dict[str, tuple[type, ...]] = {"output": _TEXT, "workdir": _TEXT}
REQUIRED = ("model", "budget")
_VARIABLE = re.compile(r"\$\{QUANTKIT_DATA(?::-(?P<default>[^}]*))?\}")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: ``data`` as written, ``lines`` of its keys (a line number, or "--set")."""

    path: Path
    data: dict[str, Any]
    lines: dict[Keys, str]

    def get(self, *keys: str, default: Any = None) -> Any:
        """The value at a path of keys, or ``default``."""
        found: Any = self.data
        for key in keys:
            if not isinstance(found, Mapping) or key not in found:
                return default
            found = found[key]
        return found

    def error(self, keys: Sequence[str], message: str) -> InvalidRequest:
        """An error about a key: ``recipe.yaml:12: key: message``."""
        return _error(self.path, self.lines, keys, message)

    @contextmanager
    def blame(self, *keys: str) -> Iterator[None]:
        """Errors about the request raised inside are errors about this key."""
        try:
            yield
        except InvalidRequest as error:
            raise self.error(keys, str(error)) from error

    def settings(self) -> dict[str, Any]:
        """The arguments of ``quantize`` that the recipe sets, without model, data and places."""
        found = {key: self.data[key] for key in SETTINGS if key in self.data}
        return found | ({"target": self.target} if self.target is not None else {})

    @property
    def target(self) -> str | None:
        """The target's name or the path of its file: relative to the recipe's folder, or to where the command runs if
        the command gives it.
        """
        asked = self.get("target")
        if not isinstance(asked, str) or not is_target_file(asked):
            return asked
        return os.path.abspath(asked) if self.lines.get(("target",)) == "--set" else str(self.resolved(asked))

    def path_of(self, *keys: str) -> Path:
        """The existing file a key names."""
        text = str(self.get(*keys))
        found = self.resolved(text)
        if not found.is_file():
            hint = " Set QUANTKIT_DATA to the folder of the data." if _VARIABLE.search(text) else ""
            raise self.error(keys, f"there is no file {str(found)!r}.{hint}")
        return found

    def resolved(self, text: str) -> Path:
        """A path as the recipe means it: the variable filled in (it is relative to where the command runs), the rest
        relative to the recipe's folder.
        """

        def value(match: re.Match[str]) -> str:
            given = os.environ.get("QUANTKIT_DATA")
            return os.path.abspath(given) if given else match["default"] or "."

        return (self.path.parent / _VARIABLE.sub(value, text)).resolve()

    @property
    def output(self) -> Path:
        """Where results go: ``output``, or ``out/<name of the recipe>``."""
        return Path(self.get("output", default=f"out/{self.path.stem}"))

    @property
    def workdir(self) -> Path:
        """Where stages leave what a later run can reuse: ``workdir``, or a folder inside the output."""
        return Path(self.get("workdir", default=self.output / "work"))


def read_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe. ``changes`` are ``key=value`` texts that override it, dotted keys for nested ones.

    Raises InvalidRequest for a file that cannot be read, YAML that cannot be parsed, unknown or missing keys and
    values of the wrong type.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"Cannot read the recipe {str(path)!r}: {getattr(error, 'strerror', error)}.") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
        lines = dict(_lines(path, node, ()))
    except RecursionError as error:
        raise InvalidRequest(f"{path}: not valid YAML: a key refers to itself, or is nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        if isinstance(error, InvalidRequest):
            raise
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InvalidRequest(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}.") from error
    if not isinstance(data, dict):
        raise InvalidRequest(f"{path}: a recipe is a table of keys; known keys: {', '.join(_known())}.")
    for change in changes:
        _change(path, data, lines, change)
    _check(path, data, lines)
    return Recipe(path, data, lines)


def _lines(path: Path, node: yaml.Node | None, keys: Keys) -> Iterator[tuple[Keys, str]]:
    """(path of keys, line number) of every key; raises InvalidRequest for a key that stands twice."""
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in first:
            raise InvalidRequest(
                f"{path}:{line}: {'.'.join((*keys, name))}: stands here and on line {first[name]}. Keep one of them."
            )
        first[name] = line
        yield (*keys, name), str(line)
        yield from _lines(path, value, (*keys, name))


def _change(path: Path, data: dict[str, Any], lines: dict[Keys, str], change: str) -> None:
    name, equals, text = change.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise InvalidRequest(f"--set {change!r} is not key=value, such as --set budget='3 bits'.")
    table = data
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise InvalidRequest(f"--set {change!r}: {key!r} in {str(path)!r} is not a table.")
    try:
        table[keys[-1]] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidRequest(f"--set {change!r}: the value is not valid YAML.") from error
    for length in range(1, len(keys)):
        lines.setdefault(keys[:length], "--set")
    lines[keys] = "--set"


def _known() -> list[str]:
    return [*SECTIONS, *SETTINGS, "export", *PLACES]


def _check(path: Path, data: Mapping[str, Any], lines: Mapping[Keys, str]) -> None:
    types: dict[str, tuple[type, ...]] = dict.fromkeys([*SECTIONS, "export"], _MAP) | SETTINGS | PLACES
    _check_table(path, data, lines, (), types)
    for name in REQUIRED:
        if data.get(name) is None:
            raise InvalidRequest(f"{path}: the key {name!r} is missing; a recipe needs {', '.join(REQUIRED)}.")
    _check_table(path, data.get("export", {}), lines, ("export",), EXPORT)
    for name, known in SECTIONS.items():
        if name in data:
            _check_table(path, data[name], lines, (name,), known)
            _check_source(path, data[name], lines, name)


def _check_table(
    path: Path, table: Mapping[str, Any], lines: Mapping[Keys, str], at: Keys, types: Mapping[str, tuple[type, ...]]
) -> None:
    for key, value in table.items():
        keys = (*at, str(key))
        if key not in types:
            hint = did_you_mean(str(key), list(types))
            raise _error(path, lines, keys, f"unknown key.{hint} Known: {', '.join(types)}.")
        if not isinstance(value, types[key]) or (isinstance(value, bool) and bool not in types[key]):
            wanted = " or ".join(_TYPE_NAMES[t] for t in types[key])
            raise _error(path, lines, keys, f"{value!r} is not {wanted}.")


_TYPE_NAMES = {str: "text", int: "a whole number", list: "a list", dict: "a table of keys", bool: "true or false"}


def _check_source(path: Path, table: Mapping[str, Any], lines: Mapping[Keys, str], name: str) -> None:
    """A section says where its thing comes from."""
    sources = tuple(key for key in ("npz", "python", "text") if key in SECTIONS[name])
    given = [key for key in sources if key in table]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise _error(path, lines, (name,), f"needs {' or '.join(sources)}; found {found}.")
    if ("tokenizer" in table) != (given == ["text"]) or ("field" in table and given != ["text"]):
        raise _error(path, lines, (name,), "needs 'text', a file of texts, and 'tokenizer' together, or neither.")
    if given == ["npz"] and "inputs" not in table:
        raise _error(
            path, lines, (name,), "needs 'inputs': the array (or arrays) of the npz file that the model takes."
        )
    if given == ["npz"] and name == "evaluate" and "labels" not in table:
        raise _error(path, lines, (name,), "needs 'labels': the array of the npz file with the right answers.")


def _error(path: Path, lines: Mapping[Keys, str], keys: Sequence[str], message: str) -> InvalidRequest:
    line = next((lines[tuple(keys[:n])] for n in range(len(keys), 0, -1) if tuple(keys[:n]) in lines), None)
    return InvalidRequest(f"{path}{f':{line}' if line else ''}: {'.'.join(keys)}: {message}")
