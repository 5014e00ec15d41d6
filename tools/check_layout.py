"""Keep the house in order: imports go down one list, files and functions stay short.

    python tools/check_layout.py [REPOSITORY]

Reads the sources with ``ast`` and imports nothing. Every import counts, also one inside a function or for types only:
what a reader has to know to understand a module is what it depends on. Prints ``path:line: what, what to do`` for
every finding and exits with 1 if there is any.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "quantkit"
FACE = "__init__"

# Lowest first. A part may import what stands on a lower line, or beside it as long as no circle forms.
ORDER = (
    ("errors", "progress", "formats", "operations", "version"),
    ("plan", "budget", "store", "latency", "targets"),
    ("numbers",),
    ("program",),
    ("simulation", "ranges", "rounding", "reconstruction"),
    ("runtime", "transforms"),
    ("sensitivity",),
    ("allocation", "backends", "report"),
    ("session", "stages"),
    ("api",),
    ("recipe",),
    ("cli",),
    (FACE, "__main__"),
)
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}

# Deciding needs no model: allocation stands on these alone, and torch is not among what they import.
BELOW_ALLOCATION = frozenset({"errors", "progress", "formats", "operations", "plan", "latency", "budget", "store"})
WITHOUT_TORCH = BELOW_ALLOCATION | {"allocation"}

# What only the stages and what stands above it may import.
CALLED_BY_STAGES = frozenset({"allocation", "backends", "report"})

CHECKED_FOLDERS = (PACKAGE, "recipes", "tools", "tests")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40


@dataclass(frozen=True)
class Import:
    """``module`` (dotted) is imported by ``importer`` (dotted) on line ``line`` of ``path``."""

    importer: str
    module: str
    path: Path
    line: int


def part_of(module: str) -> str:
    """The part of the package a dotted module name belongs to: ``quantkit.program.trace`` -> ``graph``."""
    names = module.split(".")
    return names[1] if len(names) > 1 else FACE


def modules_of(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    files = sorted((root / PACKAGE).rglob("*.py"))
    names = (".".join(file.relative_to(root).with_suffix("").parts) for file in files)
    return {name.removesuffix(f".{FACE}"): file for name, file in zip(names, files, strict=True)}


def imported_names(tree: ast.AST, package: str, modules: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of everything imported; relative imports are resolved against ``package``.

    ``from a import b`` means the module ``a.b`` where there is one, and otherwise something inside ``a``.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in modules else base, node.lineno


def read_imports(root: Path) -> list[Import]:
    """Every import written in the package."""
    modules = modules_of(root)
    found = []
    for importer, file in modules.items():
        package = importer if file.stem == FACE else importer.rpartition(".")[0]
        for name, line in imported_names(ast.parse(file.read_text(), str(file)), package, modules):
            found.append(Import(importer, name, file.relative_to(root), line))
    return found


def order_violation(found: Import) -> str | None:
    """Why an import between two parts of the package breaks the order; None when it does not."""
    lower, upper = part_of(found.module), part_of(found.importer)
    for part in (lower, upper):
        if part not in RANK:
            return f"{PACKAGE}/{part} has no place in the import order, give it one in ORDER of tools/check_layout.py"
    if lower == upper:
        return None
    if RANK[lower] > RANK[upper]:
        return f"{upper} stands below {lower} and imports {found.module}, move what both need down"
    if lower in CALLED_BY_STAGES and RANK[upper] < RANK["stages"]:
        return f"{upper} imports {found.module}, which only the stages may, pass its result in"
    if upper == "allocation" and lower not in BELOW_ALLOCATION:
        return f"allocation imports {found.module}, import only {', '.join(sorted(BELOW_ALLOCATION))}"
    return None


def check_imports(imports: list[Import]) -> list[str]:
    """Imports against the order, and torch where deciding must do without."""
    messages = []
    for found in imports:
        message = None
        if found.module.split(".")[0] == PACKAGE:
            message = order_violation(found)
        elif found.module.split(".")[0] == "torch" and part_of(found.importer) in WITHOUT_TORCH:
            message = f"{part_of(found.importer)} imports torch, compute it where the model is and pass numbers in"
        if message:
            messages.append(f"{found.path}:{found.line}: {message}")
    return messages


def check_circles(imports: list[Import]) -> list[str]:
    """One message per circle of imports, naming the shortest way round, at the import that opens it."""
    edges: dict[str, set[str]] = {}
    places: dict[tuple[str, str], str] = {}
    for found in imports:
        if found.module.split(".")[0] == PACKAGE:
            edges.setdefault(found.importer, set()).add(found.module)
            places.setdefault((found.importer, found.module), f"{found.path}:{found.line}")
    messages = []
    reported: set[frozenset[str]] = set()
    for start in sorted(edges):
        way = shortest_way(start, start, edges)
        if way and frozenset(way) not in reported:
            reported.add(frozenset(way))
            messages.append(
                f"{places[way[0], way[1]]}: import circle {' -> '.join(way)}, move what they share into a lower module"
            )
    return messages


def shortest_way(start: str, goal: str, edges: dict[str, set[str]]) -> list[str]:
    """Modules from ``start`` to ``goal`` along at least one import; empty when there is no way."""
    ways = [[start]]
    seen: set[str] = set()
    for way in ways:  # grows while it is read: breadth first
        for module in sorted(edges.get(way[-1], set()) - seen):
            if module == goal:
                return [*way, module]
            seen.add(module)
            ways.append([*way, module])
    return []


def function_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from ``def`` to the end without the docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is None:
        return lines
    docstring = function.body[0]
    assert docstring.end_lineno is not None
    return lines - (docstring.end_lineno - docstring.lineno + 1)


def check_lengths(root: Path) -> list[str]:
    """Files and functions that passed their limit."""
    messages = []
    for file in sorted(file for folder in CHECKED_FOLDERS for file in (root / folder).rglob("*.py")):
        path, source = file.relative_to(root), file.read_text()
        if (lines := len(source.splitlines())) > MAX_FILE_LINES:
            messages.append(f"{path}:{lines}: {lines} lines, at most {MAX_FILE_LINES}, split it: one idea per file")
        for node in ast.walk(ast.parse(source, str(file))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and function_lines(node) > MAX_FUNCTION_LINES:
                messages.append(
                    f"{path}:{node.lineno}: {node.name} has {function_lines(node)} lines without its docstring, "
                    f"at most {MAX_FUNCTION_LINES}, move a step of it into a function of its own"
                )
    return messages


def check(root: Path) -> list[str]:
    """All violations in a repository, readable."""
    imports = read_imports(root)
    return check_imports(imports) + check_circles(imports) + check_lengths(root)


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent
    if not (root / PACKAGE).is_dir():
        print(f"{root} holds no folder {PACKAGE}: pass the repository's root", file=sys.stderr)
        return 1
    messages = check(root)
    print("\n".join(messages) or f"layout in order: {len(modules_of(root))} modules")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
