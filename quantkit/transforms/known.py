"""All transforms there are, in the order in which they are made: rotations last, which take norms' gains away. What is
scaled before has its outliers in single channels still; strengths that are found after turning are worse
(docs/methods/rotations.md).
"""

from quantkit.transforms import channel_scaling, norm_shifting, rotate_heads, rotate_stream
from quantkit.transforms.registry import TRANSFORMS as REGISTERED

SCALINGS = (norm_shifting.SHIFTING, channel_scaling.NORMS, channel_scaling.LAYERS, channel_scaling.KEYS)
ROTATIONS = (rotate_stream.NAME, rotate_heads.NAME)
TRANSFORMS = {name: REGISTERED[name] for name in (*SCALINGS, *ROTATIONS)}
