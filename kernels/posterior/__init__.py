"""Sampling of a diagonal-Gaussian posterior together with its KL divergence to N(0, 1)."""

from .op import posterior_sample

__all__ = ["posterior_sample"]
