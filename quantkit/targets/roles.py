"""What tensors are to the operations around them, and what a runtime may ask of each: to hold codes.

``FOR_PRODUCTS``: it may, where codes are of use. Those of a sum are where a layer or a product of activations reads
them, moved, added to others or behind a fused activation, or where all operands of the sum have codes anyway. Else a
float operation reads what was quantized for the sum alone.
"""

from __future__ import annotations

LAYER_INPUT = "layer input"
LAYER_OUTPUT = "layer output"  # where the layer's kernel writes codes
ADDITION_OPERAND = "addition operand"
ADDITION_RESULT = "addition result"
QUERY, KEY, PROBABILITIES, VALUE = "query", "key", "probabilities", "value"
PRODUCT_OPERAND = "product operand"  # of a product of two activations that is no attention
ROLES = (
    LAYER_INPUT, LAYER_OUTPUT, ADDITION_OPERAND, ADDITION_RESULT, QUERY, KEY, PROBABILITIES, VALUE, PRODUCT_OPERAND,
)  # fmt: skip

MUST, MAY, FOR_PRODUCTS, CANNOT = "must", "may", "for products", "cannot"
CODES = (MUST, MAY, FOR_PRODUCTS, CANNOT)
