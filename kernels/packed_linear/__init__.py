"""A few rows times a large frozen weight that was packed once: the products of a decoding step on a CPU."""

from .op import pack_gated, pack_weight, packed_linear

__all__ = ["pack_gated", "pack_weight", "packed_linear"]
