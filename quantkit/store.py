"""Files that are either whole or absent, and keyed artefacts on disk so that a killed run resumes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from quantkit.errors import InvalidRequest

T = TypeVar("T")
Arrays = Mapping[str, np.ndarray]


def write_atomically(path: str | Path, write: Callable[[str], Any]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then rename it; nothing is left behind when it fails.

    Raises InvalidRequest when the folder cannot be written.
    """
    path = Path(path)
    temporary = ""
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
            os.close(handle)
            write(temporary)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
    return path


def data_file(path: str | Path) -> Path:
    """Where a file that does not hold its own arrays has them: ``model.onnx.data`` of ``model.onnx``."""
    return Path(f"{path}.data")


def write_with_data(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` fill a file with the name of ``path`` in a temporary folder beside it, and where it wants to its
    ``data_file``, then move both; nothing is left behind when it fails.

    A file is never seen beside data that are not its own: an earlier file goes before its data are replaced, and is
    replaced before its data go. Raises InvalidRequest when the folder cannot be written.
    """
    path = Path(path)
    data = data_file(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as folder:
            made = Path(folder) / path.name
            write(made)
            made.chmod(0o644)
            if not data_file(made).exists():
                os.replace(made, path)
                data.unlink(missing_ok=True)
                return path
            data_file(made).chmod(0o644)
            path.unlink(missing_ok=True)
            try:
                os.replace(data_file(made), data)
                os.replace(made, path)
            except BaseException:
                data.unlink(missing_ok=True)
                raise
    return path


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the system says of a file that cannot be written into an InvalidRequest."""
    try:
        yield
    except OSError as error:
        raise InvalidRequest(
            f"Cannot write {str(path)!r}: {error.strerror or error}. Choose a folder that exists and can be written."
        ) from error


def require_writable(folder: str | Path) -> Path:
    """Create ``folder`` and check that files can be made in it, before any work whose result goes there."""
    folder = Path(folder)
    write_atomically(folder / ".writable", lambda temporary: None).unlink()
    return folder


@dataclass(frozen=True)
class Codec(Generic[T]):
    """A value as arrays and a note, and the same value again."""

    encode: Callable[[T], tuple[Arrays, str]]
    decode: Callable[[Arrays, str], T]


@dataclass(frozen=True)
class Artefacts:
    """Results of finished pieces of work, a file for each, so that a run that was killed does not repeat them.

    ``folder`` belongs to one request: its name holds a digest of everything the work depends on. None keeps nothing.
    """

    folder: Path | None = None

    def cached(self, name: str, key: Any, compute: Callable[[], T], codec: Codec[T]) -> T:
        """The value kept under ``name`` for this ``key``; where there is none, what ``compute`` returns, kept as soon
        as it is there. Without a folder nothing is encoded.
        """
        kept = self.find(name, key)
        if kept is not None:
            return codec.decode(*kept)
        value = compute()
        if self.folder is not None:
            self.keep(name, key, *codec.encode(value))
        return value

    def find(self, name: str, key: Any) -> tuple[dict[str, np.ndarray], str] | None:
        """The arrays and the note kept under ``name``; None where there are none, or not whole, or for another
        ``key`` (JSON: what the piece depends on besides the request).
        """
        if self.folder is None:
            return None
        try:
            with safe_open(str(self._path(name)), framework="numpy") as file:
                header = file.metadata() or {}
                if (header.get("name"), header.get("key")) != (name, json.dumps(key)):
                    return None
                names = list(file.keys())
                return {array: file.get_tensor(array) for array in names}, header.get("note", "")
        except (OSError, SafetensorError):
            return None

    def keep(self, name: str, key: Any, arrays: Arrays, note: str = "") -> None:
        """Write the arrays of a finished piece; they are found under the same name and key from now on."""
        if self.folder is None:
            return
        # safetensors writes the memory of an array, whatever its strides say
        whole = {array: np.asarray(values, order="C") for array, values in arrays.items()}
        header = {"name": name, "key": json.dumps(key), "note": note}
        write_atomically(self._path(name), lambda temporary: save_file(whole, temporary, metadata=header))

    def remove(self) -> None:
        """Forget everything kept: what was made of it is complete."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        """Names of layers and sites may hold any character, names of files may not."""
        assert self.folder is not None, "only asked where there is a folder"
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"
