"""Documentation holds: links resolve, named paths exist, code cites pages that are there, every method has a page."""

from __future__ import annotations

import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit.cli import main

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = ("docs", "tools", "recipes", "calibration", "quantkit")
PAGES = sorted([*REPOSITORY.glob("*.md"), *(page for name in FOLDERS for page in (REPOSITORY / name).rglob("*.md"))])
HISTORY = {"CHANGELOG.md"}  # may name what has gone since
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`]+`|^ {4}.*?$", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"(?<![\w./-])(?:quantkit|tools|tests|recipes|calibration|docs)/[\w./-]*")
OUTSIDE = re.compile(r"\b(?:METHODS|DESIGN|NUMBERS)\b|\bshared/")
CITED = re.compile(r"\bdocs/[\w/-]+\.md\b")
LISTED = ("sensitivity", "rankings", "rounding", "ranges", "reconstruction", "correction")


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def anchors(page: Path) -> set[str]:
    """The names that headings of a page can be linked by."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading).lower().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Links of a page to files, or to headings, that are not there."""
    broken = []
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    return broken


def missing_paths(page: Path, root: Path) -> list[str]:
    """Paths inside the repository that a page names as code, and that are not there."""
    named = [path for code in CODE.findall(page.read_text()) for path in PATH.findall(code)]
    return [path for path in named if not (root / path.rstrip(".")).exists()]


def comments_and_strings(path: Path) -> Iterator[str]:
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING):
                yield token.string


def sources() -> list[Path]:
    """The Python files that may cite pages; this one names what it forbids."""
    found = [
        path for folder in ("quantkit", "tests", "tools", "recipes") for path in (REPOSITORY / folder).rglob("*.py")
    ]
    return sorted(path for path in found if path != Path(__file__).resolve())


def test_there_are_pages_and_sources() -> None:
    assert {"README.md", "docs/README.md", "docs/methods/README.md", "docs/results/README.md"} <= set(
        map(relative, PAGES)
    )
    assert len(sources()) > 100


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_resolve(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=relative)
def test_named_paths_exist(page: Path) -> None:
    assert missing_paths(page, REPOSITORY) == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_pages_refer_to_nothing_outside_the_repository(page: Path) -> None:
    assert OUTSIDE.findall(page.read_text()) == []


def test_code_cites_pages_that_are_there_and_nothing_outside() -> None:
    outside = re.compile(r"\b(?:METHODS|DESIGN|NUMBERS)\b|\bshared/\w+\.md")
    wrong = []
    for path in sources():
        for text in comments_and_strings(path):
            missing = [page for page in CITED.findall(text) if not (REPOSITORY / page).is_file()]
            wrong += [f"{relative(path)}: {found}" for found in [*missing, *outside.findall(text)]]
    assert wrong == []


@pytest.mark.parametrize("folder", ["docs", "docs/methods", "docs/results"])
def test_an_index_leads_to_every_page(folder: str) -> None:
    index = REPOSITORY / folder / "README.md"
    linked = {(index.parent / target.partition("#")[0]).resolve() for target in LINK.findall(index.read_text())}
    assert {page.resolve() for page in index.parent.glob("*.md")} - linked == {index.resolve()}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent.name == "results" and page.name != "README.md"], ids=relative
)
def test_every_table_of_results_has_its_command(page: Path) -> None:
    """A section with a table names a command, or explains the columns of those behind it, which do."""
    text = page.read_text()
    assert "`python tools/" in text
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        assert "|---" not in section or "`python tools/" in section, section.splitlines()[0]


def test_every_method_that_can_be_asked_for_has_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = [line.partition(" ") for line in capsys.readouterr().out.splitlines()]
    names = {key: re.sub(r"\(.*", "", rest).replace(" ", "").split(",") for key, _, rest in lines if key in LISTED}
    assert set(names) == set(LISTED)
    index = (REPOSITORY / "docs" / "methods" / "README.md").read_text()
    wanted = {name for some in names.values() for name in some} - {"auto", "none"}
    assert {name for name in wanted if f'"{name}"' not in index} == set()


def test_what_is_wrong_is_seen(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "one.md").write_text("# A heading, here\n")
    page = tmp_path / "docs" / "page.md"
    page.write_text(
        "[a](one.md), [b](one.md#a-heading-here), [c](https://example.org), [two\nlines](two.md), [d](one.md#gone)\n"
        "`docs/one.md`, `python tools/gone.py --models x`, docs/in-prose.md, `out/docs/x`, `docs/`\n\n"
        "    run recipes/gone.yaml\n"
    )
    assert broken_links(page) == ["two.md", "one.md#gone"]
    assert missing_paths(page, tmp_path) == ["tools/gone.py", "recipes/gone.yaml"]
    assert OUTSIDE.findall("as DESIGN says, METHODS.md, ../shared/data") == ["DESIGN", "METHODS", "shared/"]
    assert OUTSIDE.findall("designed, a method, RedesignED") == []
