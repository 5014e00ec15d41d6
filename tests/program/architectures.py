"""The zoo that recording, replay, ownership and simulation are tested on: every network, registered under its name.

The networks stand in ``nets/``, by what they are made of; none of them imports quantkit.
"""

from __future__ import annotations

from tests.program.nets import attention, convolution, forms, huggingface, recurrent, vision, weights
from tests.program.nets.entry import ARCHITECTURES, Architecture, float_elements, floating_outputs

__all__ = ["ARCHITECTURES", "FILES", "Architecture", "float_elements", "floating_outputs"]

# Importing a file registers its networks.
FILES = (attention, convolution, forms, huggingface, recurrent, vision, weights)
