"""A file is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quantkit import store
from quantkit.errors import InvalidRequest
from quantkit.store import Artefacts, Codec, data_file, require_writable, write_atomically, write_with_data


def below_a_file(folder: Path) -> Path:
    """A path that nobody can write to, root included: its folder is a regular file."""
    (folder / "file").write_text("not a folder")
    return folder / "file" / "inside"


def test_the_file_holds_what_was_written_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deeper" / "out.bin"
    assert write_atomically(str(path), lambda temporary: Path(temporary).write_bytes(b"abc")) == path
    assert path.read_bytes() == b"abc"
    assert os.listdir(path.parent) == ["out.bin"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_the_old_file_stands_whole_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    seen = []

    def write(temporary: str) -> None:
        with open(temporary, "w") as file:
            file.write("half of the")
            file.flush()
            seen.append((path.read_text(), Path(temporary).parent))
            file.write(" new")

    write_atomically(path, write)
    assert seen == [("old", tmp_path)]
    assert path.read_text() == "half of the new"


def test_who_reads_the_old_file_goes_on_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old and long")
    with path.open() as reader:
        write_atomically(path, lambda temporary: Path(temporary).write_text("new"))
        assert reader.read() == "old and long"
    assert path.read_text() == "new"


FAILURES = [ValueError("bad data"), KeyboardInterrupt(), SystemExit(3), OSError(28, "No space left on device")]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("before", ["old", None])
def test_a_failure_leaves_the_folder_as_it_was(tmp_path: Path, failure: BaseException, before: str | None) -> None:
    path = tmp_path / "out.txt"
    if before is not None:
        path.write_text(before)

    def write(temporary: str) -> None:
        Path(temporary).write_text("half")
        raise failure

    expected = InvalidRequest if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        write_atomically(path, write)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == (
        {} if before is None else {"out.txt": before}
    )


def test_a_full_disk_is_named_in_the_error(tmp_path: Path) -> None:
    def write(temporary: str) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(InvalidRequest) as caught:
        write_atomically(tmp_path / "out.txt", write)
    assert str(caught.value).startswith(f"Cannot write {str(tmp_path / 'out.txt')!r}: No space left on device. Choose")


def test_a_folder_that_cannot_be_written_is_refused_before_writing(tmp_path: Path) -> None:
    path = below_a_file(tmp_path) / "out.txt"
    with pytest.raises(InvalidRequest) as caught:
        write_atomically(path, lambda temporary: pytest.fail("wrote although the folder does not exist"))
    assert f"Cannot write {str(path)!r}: " in str(caught.value)
    assert str(caught.value).endswith("Choose a folder that exists and can be written.")
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("kept")
    with pytest.raises(InvalidRequest, match=r"Cannot write .*out': "):
        write_atomically(tmp_path / "out", lambda temporary: Path(temporary).write_text("new"))
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "kept").read_text() == "kept"


def pair(number: int) -> Callable[[Path], None]:
    """Writes a file that names its data by a number, and data of that number; odd numbers have no data."""

    def write(path: Path) -> None:
        path.write_text(f"reads {number}" if number % 2 == 0 else f"holds {number}")
        if number % 2 == 0:
            data_file(path).write_text(f"data {number}")

    return write


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir() if file.is_file()}


PAIR = {"out": "reads 2", "out.data": "data 2"}


def test_a_file_and_its_data_replace_earlier_ones(tmp_path: Path) -> None:
    for number, wanted in (
        (2, PAIR),
        (4, {"out": "reads 4", "out.data": "data 4"}),
        (3, {"out": "holds 3"}),
        (2, PAIR),
    ):
        assert write_with_data(tmp_path / "out", pair(number)) == tmp_path / "out"
        assert contents(tmp_path) == wanted
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_failure_while_a_pair_is_written_leaves_the_earlier_one(tmp_path: Path, failure: BaseException) -> None:
    def write(path: Path) -> None:
        pair(4)(path)
        raise failure

    write_with_data(tmp_path / "out", pair(2))
    with pytest.raises(InvalidRequest if isinstance(failure, OSError) else type(failure)):
        write_with_data(tmp_path / "out", write)
    assert contents(tmp_path) == PAIR


@pytest.mark.parametrize("before", [2, 3])
@pytest.mark.parametrize("number", [4, 5])
@pytest.mark.parametrize("step", range(4))
def test_no_file_is_seen_beside_data_of_another(
    tmp_path: Path, before: int, number: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever step of putting a pair in place is the last that a process comes to."""
    write_with_data(tmp_path / "out", pair(before))
    done, seen = list[object](), list[dict[str, str]]()

    def counted(act: Callable[..., None]) -> Callable[..., None]:
        def perform(*arguments: object, **options: object) -> None:
            if tmp_path not in (Path(str(one)).parent for one in arguments):
                return act(*arguments, **options)  # in the temporary folder
            if len(done) == step:
                raise OSError(28, "No space left on device")
            act(*arguments, **options)
            done.append(arguments)
            seen.append(contents(tmp_path))

        return perform

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", counted(os.replace))
        patched.setattr(Path, "unlink", counted(Path.unlink))
        try:
            write_with_data(tmp_path / "out", pair(number))
        except InvalidRequest:
            assert len(done) == step
    for found in (*seen, contents(tmp_path)):
        reads = found.get("out", "").removeprefix("reads ")
        assert not reads.isdigit() or found["out.data"] == f"data {reads}"


def test_a_writable_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    assert require_writable(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert os.listdir(tmp_path / "a" / "b") == []


def test_a_writable_folder_keeps_its_files(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    require_writable(tmp_path)
    assert os.listdir(tmp_path) == ["kept"]


def test_requiring_a_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"Cannot write .*inside.*Choose a folder that exists"):
        require_writable(below_a_file(tmp_path))


def pieces() -> dict[str, np.ndarray]:
    return {"a": np.arange(6.0).reshape(2, 3).T, "b": np.array(1.5), "codes": np.zeros((0, 2), np.int8)}


def test_artefacts_are_found_under_their_name_and_key_only(tmp_path: Path) -> None:
    artefacts = Artefacts(tmp_path / "work")
    assert artefacts.find("layer a/b", [1]) is None
    artefacts.keep("layer a/b", [1], pieces(), "a note")
    found, note = artefacts.find("layer a/b", [1]) or ({}, "")
    assert note == "a note"
    assert found.keys() == pieces().keys()
    assert all(np.array_equal(found[name], array) for name, array in pieces().items())
    assert artefacts.find("layer a/b", [2]) is None
    assert artefacts.find("layer a", [1]) is None
    artefacts.remove()
    artefacts.remove()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: d[:-1], lambda d: b"\xff" * 64])
def test_artefacts_that_are_not_whole_are_not_found(tmp_path: Path, damage) -> None:
    artefacts = Artefacts(tmp_path)
    artefacts.keep("layer", [], pieces())
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert artefacts.find("layer", []) is None
    artefacts.keep("layer", [], pieces())
    assert artefacts.find("layer", []) is not None


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Artefacts().keep("layer", [], pieces())
    assert Artefacts().find("layer", []) is None
    Artefacts().remove()
    assert os.listdir(tmp_path) == []


def pair_codec() -> Codec[tuple[list[float], str]]:
    return Codec(
        lambda value: ({"numbers": np.array(value[0])}, value[1]),
        lambda arrays, note: (arrays["numbers"].tolist(), note),
    )


class Work:
    """Computes a value and counts how often."""

    def __init__(self, value: tuple[list[float], str] = ([0.1, 2.0], "a note")) -> None:
        self.value, self.count = value, 0

    def __call__(self) -> tuple[list[float], str]:
        self.count += 1
        return self.value


def test_a_cached_value_is_computed_once_and_read_by_another_process_as_it_was(tmp_path: Path) -> None:
    work = Work()
    for _ in range(3):
        assert Artefacts(tmp_path).cached("layer a/b", ["w4", 1], work, pair_codec()) == ([0.1, 2.0], "a note")
    assert work.count == 1


@pytest.mark.parametrize(("name", "key"), [("layer", 2), ("layer", [1]), ("layer", "1"), ("layer ", 1)])
def test_a_cached_value_of_another_name_or_key_is_computed_again(name: str, key: object, tmp_path: Path) -> None:
    first, second = Work(), Work(([7.0], ""))
    Artefacts(tmp_path).cached("layer", 1, first, pair_codec())
    assert Artefacts(tmp_path).cached(name, key, second, pair_codec()) == ([7.0], "")
    assert Artefacts(tmp_path).cached(name, key, first, pair_codec()) == ([7.0], "")
    assert (first.count, second.count) == (1, 1)


@pytest.mark.parametrize(
    "damage", [lambda d: b"", lambda d: d[:-1], lambda d: d[: len(d) // 2], lambda d: b"\xff" * 64]
)
def test_a_cached_value_that_is_not_whole_is_computed_again_and_mended(tmp_path: Path, damage) -> None:
    work = Work()
    Artefacts(tmp_path).cached("layer", 1, work, pair_codec())
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    for _ in range(2):
        assert Artefacts(tmp_path).cached("layer", 1, work, pair_codec()) == work.value
    assert work.count == 2


@pytest.mark.parametrize("where", ["computing", "encoding", "writing"])
def test_killed_before_a_value_is_kept_nothing_is_left(where: str, tmp_path: Path, monkeypatch) -> None:
    class Killed(Exception):
        pass

    def killed(*_, **__):
        raise Killed

    codec = pair_codec()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if where == "writing":
            patch.setattr(store, "save_file", killed)
        codec = Codec(killed, codec.decode) if where == "encoding" else codec
        Artefacts(tmp_path).cached("layer", 1, killed if where == "computing" else Work(), codec)
    assert os.listdir(tmp_path) == []
    work = Work()
    assert Artefacts(tmp_path).cached("layer", 1, work, pair_codec()) == work.value
    assert work.count == 1


def test_killed_between_pieces_only_the_missing_ones_are_computed(tmp_path: Path) -> None:
    works = [Work(([float(k)], str(k))) for k in range(5)]
    for upto in (2, 4, 5):  # each run gets further than the one before
        for k in range(upto):
            assert Artefacts(tmp_path).cached(f"piece {k}", k, works[k], pair_codec()) == works[k].value
    assert [work.count for work in works] == [1] * 5


def test_without_a_folder_a_value_is_computed_every_time_and_never_encoded() -> None:
    work, codec = Work(), Codec(lambda value: pytest.fail("encoded"), pair_codec().decode)
    for _ in range(2):
        assert Artefacts().cached("layer", 1, work, codec) == work.value
    assert work.count == 2
