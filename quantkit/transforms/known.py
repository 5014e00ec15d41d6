"""All transforms there are, in the order in which they are made."""

from quantkit.transforms import norm_shifting as norm_shifting  # isort: skip
from quantkit.transforms import channel_scaling as channel_scaling
from quantkit.transforms.registry import TRANSFORMS as TRANSFORMS
