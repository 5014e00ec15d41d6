"""All networks of the zoo."""

from __future__ import annotations

from . import language, perception, plain, plain_more, timm_models, torchvision_models
from .entry import ZOO

__all__ = ["FILES", "ZOO"]

# Importing a file registers its networks, in this order.
FILES = (plain, plain_more, language, perception, torchvision_models, timm_models)
