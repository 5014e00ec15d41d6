"""The scheme grammar of the design written out as text: what the tests of formats and targets count through."""

from __future__ import annotations

from itertools import product

# Bits of one code, and the bit planes that codes of so many bits are stored as: both by hand.
BITS = {"2": 2, "3": 3, "4": 4, "5": 5, "6": 6, "7": 7, "8": 8, "16": 16}
BITS |= {"fp8": 8, "fp8e5m2": 8, "nvfp4": 4, "mxfp4": 4, "log4": 4}
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,), 16: (8, 8)}

GROUPS = ("", "g1", "g64")
USUAL, IN_GROUPS = ("", "sf16", "sf8", "si8"), ("", "sf32", "sf8", "si8")  # scales as they are printed
WHOLE = ("", "16", "nvfp4", "mxfp4")  # float16 values have no scales, blocks have their own
WEIGHTS = [
    f"w{fmt}{group}{zero}{scale}"
    for fmt, group, zero in product(BITS, GROUPS, ("", "z"))
    for scale in (IN_GROUPS if group and fmt.isdigit() else USUAL)
    if fmt not in WHOLE and not (zero and not fmt.isdigit())  # zero points are integers
]
WEIGHTS += [f"w{fmt}" for fmt in WHOLE[1:]]
ACTIVATIONS = ["a" + "".join(parts) for parts in product(BITS, ("", "d"), GROUPS)]
SCHEMES = ["float", *("".join(parts) for parts in product(["", *WEIGHTS], ["", *ACTIVATIONS]) if any(parts))]
