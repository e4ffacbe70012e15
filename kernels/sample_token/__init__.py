"""The next token of every row of logits: greedy, or drawn under filters, without a sort and without a host sync."""

from .op import sample_token

__all__ = ["sample_token"]
