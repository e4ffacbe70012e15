"""Families whose attention is not in transformers' registry: a file for each kind of attention module.

Every file here is imported, and what it decorates with `exchanges` takes the place of one method of the named classes while a
call of ours is under way. How to add one: docs/adding_a_decoder.md.
"""

from lmvae_fast.models.decoder.adapters.exchange import exchange_attention, exchange_positions, exchanges

__all__ = ["exchange_attention", "exchange_positions", "exchanges"]
