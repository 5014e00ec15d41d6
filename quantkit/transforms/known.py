"""All transforms there are, in the order in which they are tried: rotations first, which take norms' gains away and so
what was scaled there; what is uneven after them is scaled.
"""

from quantkit.transforms import channel_scaling, norm_shifting, rotate_heads, rotate_stream
from quantkit.transforms.registry import TRANSFORMS as REGISTERED

ROTATIONS = (rotate_stream.NAME, rotate_heads.NAME)
SCALINGS = (norm_shifting.SHIFTING, channel_scaling.NORMS, channel_scaling.LAYERS, channel_scaling.KEYS)
TRANSFORMS = {name: REGISTERED[name] for name in (*ROTATIONS, *SCALINGS)}
