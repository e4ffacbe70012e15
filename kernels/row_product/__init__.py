"""A product of a few rows with a weight, and what stands before and behind it in a decoder layer, as one kernel."""

from .op import MOST_ROWS, row_product
from .reference import Norm

__all__ = ["MOST_ROWS", "Norm", "row_product"]
