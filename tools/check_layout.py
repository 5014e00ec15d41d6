"""Keep the house in order: imports go down one list, files and functions stay short.

    python tools/check_layout.py [REPOSITORY]

Reads the sources with ``ast`` and imports nothing. Every import counts, also one inside a function or for types only:
what a reader has to know to understand a module is what it depends on. Prints ``path:line: what, what to do`` for
every finding and exits with 1 if there is any. The last line is the size of the package: lines without docstrings,
comments and blank lines.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "quantkit"
FACE = "__init__"

# Lowest first. A part may import what stands on a lower line, or beside it as long as no circle forms.
ORDER = (
    ("errors", "progress", "formats", "version"),
    ("plan", "budget", "store", "targets"),
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
BELOW_ALLOCATION = frozenset({"errors", "progress", "formats", "plan", "budget", "store"})
WITHOUT_TORCH = BELOW_ALLOCATION | {"allocation"}

# What only the stages and what stands above it may import.
CALLED_BY_STAGES = frozenset({"allocation", "backends", "report"})

CHECKED_FOLDERS = (PACKAGE, "recipes", "tools", "tests")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40
MAX_PARAMETERS = 6

# Where kinds of quantized numbers are told apart, and what their classes inherit.
OF_QUANTIZERS, QUANTIZER = "numbers", "Quantizer"

# Public, and not among what the package's own __init__ imports.
ALSO_PUBLIC = frozenset({f"{PACKAGE}.stages.bench.bench"})

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """``module`` (dotted) is imported by ``importer`` (dotted) on line ``line`` of ``path``."""

    importer: str
    module: str
    path: Path
    line: int


def part_of(module: str) -> str:
    """The part of the package a dotted module name belongs to: ``quantkit.program.trace`` -> ``program``."""
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


def function_lines(function: Function) -> int:
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
            if isinstance(node, Function) and function_lines(node) > MAX_FUNCTION_LINES:
                messages.append(
                    f"{path}:{node.lineno}: {node.name} has {function_lines(node)} lines without its docstring, "
                    f"at most {MAX_FUNCTION_LINES}, move a step of it into a function of its own"
                )
    return messages


def names_in(node: ast.AST) -> set[str]:
    """Every name in an expression, of ``a.b`` both."""
    plain = {found.id for found in ast.walk(node) if isinstance(found, ast.Name)}
    return plain | {found.attr for found in ast.walk(node) if isinstance(found, ast.Attribute)}


def quantizer_names(trees: dict[str, ast.Module]) -> set[str]:
    """The classes of quantized numbers, and the unions of them that have a name."""
    inside = [node for name, tree in trees.items() if part_of(name) == OF_QUANTIZERS for node in tree.body]
    classes = [node for node in inside if isinstance(node, ast.ClassDef)]
    found = {QUANTIZER} | {node.name for node in classes if any(QUANTIZER in names_in(base) for base in node.bases)}
    for node in inside:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp) and names_in(node.value) & found:
            found |= names_in(node.targets[0])
    return found


def told_apart(node: ast.AST) -> set[str]:
    """The classes that ``isinstance``, ``issubclass``, ``type(x) is`` or a pattern compares with."""
    if isinstance(node, ast.MatchClass):
        return names_in(node.cls)
    if isinstance(node, ast.Call) and len(node.args) == 2 and names_in(node.func) & {"isinstance", "issubclass"}:
        return names_in(node.args[1])
    if isinstance(node, ast.Compare) and isinstance(node.left, ast.Call) and "type" in names_in(node.left.func):
        return set[str]().union(*map(names_in, node.comparators))
    return set()


def check_quantizers(trees: dict[str, ast.Module], paths: dict[str, Path]) -> list[str]:
    """Kinds of quantized numbers told apart by their classes outside the folder that knows them."""
    known, messages = quantizer_names(trees), []
    for name, tree in trees.items():
        for node in ast.walk(tree) if part_of(name) != OF_QUANTIZERS else ():
            if isinstance(node, ast.expr | ast.pattern) and (found := sorted(told_apart(node) & known)):
                messages.append(
                    f"{paths[name]}:{node.lineno}: asks whether a quantizer is {' or '.join(found)}, ask for what it "
                    f"can do ({QUANTIZER} in {PACKAGE}/{OF_QUANTIZERS}) or look up its kind"
                )
    return messages


def parameters_of(function: Function) -> int:
    """How many parameters a function has, ``self`` and ``cls`` left out."""
    given = function.args
    plain = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    own = plain[:1] in (["self"], ["cls"])
    return len(plain) - own + len(given.kwonlyargs) + bool(given.vararg) + bool(given.kwarg)


def check_parameters(trees: dict[str, ast.Module], paths: dict[str, Path]) -> list[str]:
    """Functions with more parameters than a reader keeps in mind; the public verbs and kernels of Triton have them."""
    face = [node for node in trees[PACKAGE].body if isinstance(node, ast.ImportFrom)]
    public = ALSO_PUBLIC | {f"{node.module}.{alias.name}" for node in face for alias in node.names}
    messages = []
    for name, tree in trees.items():
        verbs = [node for node in tree.body if isinstance(node, Function) and f"{name}.{node.name}" in public]
        for node in ast.walk(tree):
            if not isinstance(node, Function) or node in verbs or parameters_of(node) <= MAX_PARAMETERS:
                continue
            if not any("jit" in names_in(decorator) for decorator in node.decorator_list):
                messages.append(
                    f"{paths[name]}:{node.lineno}: {node.name} has {parameters_of(node)} parameters, at most "
                    f"{MAX_PARAMETERS}, group what belongs together in a frozen record"
                )
    return messages


def code_lines(source: str) -> int:
    """Lines without docstrings, comments and blank lines."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function | ast.ClassDef | ast.Module) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            assert docstring.end_lineno is not None
            documented |= set(range(docstring.lineno, docstring.end_lineno + 1))
    stripped = ((number, line.strip()) for number, line in enumerate(source.splitlines(), 1))
    return sum(bool(line) and not line.startswith("#") and number not in documented for number, line in stripped)


def check(root: Path) -> list[str]:
    """All violations in a repository, readable."""
    imports, modules = read_imports(root), modules_of(root)
    trees = {name: ast.parse(file.read_text(), str(file)) for name, file in modules.items()}
    paths = {name: file.relative_to(root) for name, file in modules.items()}
    found = check_imports(imports) + check_circles(imports) + check_lengths(root)
    return found + check_quantizers(trees, paths) + check_parameters(trees, paths)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Check the layout of a repository.")
    parser.add_argument("repository", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent)
    root = parser.parse_args(arguments).repository
    if not (root / PACKAGE).is_dir():
        print(f"{root} holds no folder {PACKAGE}: pass the repository's root", file=sys.stderr)
        return 1
    modules, messages = modules_of(root), check(root)
    print("\n".join(messages) or f"layout in order: {len(modules)} modules")
    print(f"{sum(code_lines(file.read_text()) for file in modules.values()):,} lines of code")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
