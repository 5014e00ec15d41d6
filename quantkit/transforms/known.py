"""All transforms there are, in the order in which they are tried."""

from quantkit.transforms import channel_scaling as channel_scaling
from quantkit.transforms.registry import TRANSFORMS as TRANSFORMS
