"""A few rows times a large frozen weight that was packed once: the products of a decoding step on a CPU."""

from .choices import most_rows, training_product
from .int8 import QuantizedWeight, packed_linear_int8, quantize_gated, quantize_weight
from .layer import PackedLinear
from .op import pack_gated, pack_weight, packed_linear

__all__ = [
    "PackedLinear",
    "QuantizedWeight",
    "most_rows",
    "pack_gated",
    "pack_weight",
    "packed_linear",
    "packed_linear_int8",
    "quantize_gated",
    "quantize_weight",
    "training_product",
]
