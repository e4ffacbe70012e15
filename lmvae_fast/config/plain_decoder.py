"""What a decoder without a latent is, that answers prompts: what is fine-tuned before a conditional VAE is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lmvae_fast.config.base import ConfigBase
from lmvae_fast.config.model import DECODER_PARTS, DTYPES


@dataclass(frozen=True)
class PlainDecoderConfig(ConfigBase):
    """A decoder that answers prompts, without a latent. Fields mean what they mean in LMVAEConfig.

    Attributes:
        decoder: Hugging Face name or folder of the causal language model.
        max_len: the most tokens of a response, its end token included. max_prompt_len: of a prompt; longer ones lose their
            left end. None for all.
        train_decoder: whether it trains. decoder_part, lora_rank, lora_alpha: what of it then does.
        length_normalize: a response counts by its mean token instead of the sum of its tokens.
        add_prefix_space: tokenise the first word like any other.
        dtype: that a frozen decoder is held in; what trains is float32 at least.
    """

    decoder: str = "gpt2"
    max_len: int = 64
    max_prompt_len: int | None = None
    train_decoder: bool = True
    decoder_part: str = "all"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    length_normalize: bool = False
    add_prefix_space: bool = False
    dtype: str = "float32"

    # What the loop, the batches and the engine ask of any model's configuration, and a decoder by itself has no choice about.
    prompted: ClassVar[bool] = True
    latent_dim: ClassVar[int] = 0
    slots: ClassVar[int] = 0
    visibility: ClassVar[str] = "prefix"
    annotations: ClassVar[tuple[str, ...]] = ()
    conditional_decoder: ClassVar[bool] = False
    group_size: ClassVar[int] = 1
    encoder_padding: ClassVar[str] = "masked"
    train_encoder: ClassVar[bool] = True  # there is none, so nothing of it is to be cached
    objective: ClassVar[str] = "elbo"
    count_start_token: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._choice("decoder_part", DECODER_PARTS)
        self._choice("dtype", DTYPES)
        self._number("max_len", 1, integer=True)
        self._number("max_prompt_len", 1, integer=True, optional=True)
        self._number("lora_rank", 1, integer=True)
        self._number("lora_alpha", 0.0, open_low=True)
        self._text("decoder")
        self._flag("train_decoder", "length_normalize", "add_prefix_space")
