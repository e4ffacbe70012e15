"""Log-density of latents under the mean of a group's diagonal-Gaussian posteriors."""

from .op import aggregate_logpdf

__all__ = ["aggregate_logpdf"]
