"""The token of greatest logit, without its logits: on a CPU a bf16 product finds candidates among which fp32 decides."""

from .op import MOST_ROWS, GreedyHead, greedy_head, greedy_product, pack_head

__all__ = ["MOST_ROWS", "GreedyHead", "greedy_head", "greedy_product", "pack_head"]
