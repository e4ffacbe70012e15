"""How posterior_sample reduces the KL of the dimensions: the names, and the numbers that compiled kernels know them by."""

from __future__ import annotations

KL_MODES = ("sum", "dim_threshold", "free_bits", "sample_threshold")
SUM, DIM_THRESHOLD, FREE_BITS, SAMPLE_THRESHOLD = range(4)  # enum KlMode in csrc/cpu/posterior.h has the same order
