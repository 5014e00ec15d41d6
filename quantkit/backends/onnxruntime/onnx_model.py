"""An ONNX file as a torch module, so that what measures a model measures the file as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.backends.onnxruntime.sessions import open_session, run_session


class OnnxModel(nn.Module):
    """Runs a file in onnxruntime: tensors in, one tensor out, or a dict of them by output name where there are
    several.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.session = open_session(path)
        self.names = [output.name for output in self.session.get_outputs()]
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | dict[str, Tensor]:
        found = [torch.from_numpy(array) for array in run_session(self.session, (args, kwargs))]
        return found[0] if len(found) == 1 else dict(zip(self.names, found, strict=True))
