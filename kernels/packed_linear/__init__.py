"""A few rows times a large frozen weight that was packed once: the products of a decoding step on a CPU."""

from .op import PackedLinear, most_rows, pack_gated, pack_weight, packed_linear

__all__ = ["PackedLinear", "most_rows", "pack_gated", "pack_weight", "packed_linear"]
