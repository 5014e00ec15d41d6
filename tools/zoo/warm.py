"""Imported before processes are forked: the first export of a process imports and compiles for seconds."""

from __future__ import annotations

import torch

from quantkit.backends.onnxruntime.marks import OPSET

torch.onnx.export(torch.nn.Linear(2, 2), (torch.zeros(2, 2),), dynamo=True, opset_version=OPSET, verbose=False)
