"""Files that are either whole or absent, and small keyed artefacts on disk so that a killed run resumes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantkit.errors import InvalidRequest


def write_atomically(path: str | Path, write: Callable[[str], Any]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then rename it; nothing is left behind when it fails.

    Raises InvalidRequest when the folder cannot be written.
    """
    path = Path(path)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise InvalidRequest(
            f"Cannot write {str(path)!r}: {error.strerror or error}. Choose a folder that exists and can be written."
        ) from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
    return path


def require_writable(folder: str | Path) -> Path:
    """Create ``folder`` and check that files can be made in it, before any work whose result goes there."""
    folder = Path(folder)
    write_atomically(folder / ".writable", lambda temporary: None).unlink()
    return folder
