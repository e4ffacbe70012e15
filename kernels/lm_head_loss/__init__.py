"""Cross-entropy of a language-model head that never holds the [tokens, vocabulary] logits."""

from .op import lm_head_loss

__all__ = ["lm_head_loss"]
