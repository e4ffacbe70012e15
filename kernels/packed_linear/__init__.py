"""A few rows times a large frozen weight that was packed once: the products of a decoding step on a CPU."""

from .op import PackedLinear, pack_gated, pack_weight, packed_linear

__all__ = ["PackedLinear", "pack_gated", "pack_weight", "packed_linear"]
