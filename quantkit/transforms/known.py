"""All transforms there are, in the order in which they are made: rotations mix what was scaled."""

from quantkit.transforms import norm_shifting as norm_shifting  # isort: skip
from quantkit.transforms import channel_scaling as channel_scaling
from quantkit.transforms import rotate_heads as rotate_heads
from quantkit.transforms import rotate_stream as rotate_stream
from quantkit.transforms.registry import TRANSFORMS as TRANSFORMS
