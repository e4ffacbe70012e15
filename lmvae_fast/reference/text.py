"""What both published systems do to a decoder's tokenizer."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def add_prefix_space(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Makes the tokenizer, in place, read the first word of a text like any other, and returns it.

    transformers 5 accepts ``add_prefix_space=True`` when loading and then does nothing with it where the tokenizer is a
    plain ``tokenizer.json``; version 4, which LangVAE needs, rewrote the pre-tokenizer. This does what version 4 did.
    """
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    if hasattr(pre_tokenizer, "add_prefix_space"):
        pre_tokenizer.add_prefix_space = True
    return tokenizer
