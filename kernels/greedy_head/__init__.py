"""The token of greatest logit, without its logits: a bf16 product finds the candidates, fp32 decides among them."""

from .op import GreedyHead, greedy_head, pack_head

__all__ = ["GreedyHead", "greedy_head", "pack_head"]
