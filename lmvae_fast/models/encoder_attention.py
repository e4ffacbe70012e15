"""Which attention an encoder computes with: flash-attn's where it is installed and can run, its usual one elsewhere.

flash-attn reads sentences without their padding, so a batch of mixed lengths costs what its tokens cost. It runs on CUDA in
half precision alone; a model may be moved or cast at any time, so this is asked at every pass and changed when the answer has.
"""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

logger = logging.getLogger(__name__)

FLASH = "flash_attention_2"
_USUAL = "_attention_without_flash"  # what a model had before it was given flash-attn's: with the model, and its copies


def choose_attention(model: PreTrainedModel) -> None:
    """Give a model flash-attn's attention where that can run, and its usual one back where it cannot any more."""
    weight = next(model.parameters())
    able = weight.dtype in (torch.float16, torch.bfloat16) and _on_cuda(weight) and is_flash_attn_2_available()
    own = vars(model)
    if able and _USUAL not in own and getattr(type(model), "_supports_flash_attn", False):
        usual = str(model.config._attn_implementation)
        try:
            model.set_attn_implementation(FLASH)
        except (ValueError, ImportError) as error:  # of a version that this model cannot call
            logger.info("%s keeps its attention (%s): %s", type(model).__name__, usual, error)
        own[_USUAL] = usual
    elif not able and _USUAL in own:
        model.set_attn_implementation(own.pop(_USUAL))


def _on_cuda(weight: torch.Tensor) -> bool:
    return weight.device.type == "cuda"
