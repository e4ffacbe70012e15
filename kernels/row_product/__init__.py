"""A product of a few rows with a weight, and what stands before and behind it in a decoder layer, as one kernel."""

from .op import MOST_ROWS, row_product
from .reference import Norm
from .ways import WAY

__all__ = ["MOST_ROWS", "WAY", "Norm", "row_product"]
