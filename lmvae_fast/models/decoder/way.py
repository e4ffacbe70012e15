"""How a decoder's body is called so that our attention runs in every layer; the examination chooses."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmvae_fast.models.decoder.attention import ATTENTION, AttentionContext
from lmvae_fast.models.decoder.running import run_with


@dataclass(frozen=True)
class Way:
    """A way to our attention.

    Attributes:
        attention: the implementation that the model is switched to (its own, where an adapter exchanges methods).
        by_keyword: whether the body hands the context down as a keyword argument; it is found by `running` otherwise.
        takes_positions: whether the body takes position ids; what looks them up asks `running` otherwise.
        takes_types: whether the body is told that all tokens are of the first type, since what it assumes itself reaches no
            further than one sentence's positions (BigBird), and a packed batch does.
    """

    attention: str = ATTENTION
    by_keyword: bool = True
    takes_positions: bool = True
    takes_types: bool = False
    #: Whether everything goes down by keyword, as in most decoders; kept, since every step asks.
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        plain = self.by_keyword and self.takes_positions and self.attention == ATTENTION
        object.__setattr__(self, "plain", plain)

    def call(self, body: nn.Module, embedded: Tensor, positions: Tensor, context: AttentionContext) -> Any:
        """Run the body on ``[1, T, hidden]`` at positions ``[T]``."""
        options: dict[str, Any] = {"position_ids": positions.unsqueeze(0)} if self.takes_positions else {}
        if self.takes_types:
            options["token_type_ids"] = torch.zeros_like(positions).unsqueeze(0)
        if self.by_keyword:
            options["lmvae"] = context
        with run_with(context, positions):
            return body(inputs_embeds=embedded, use_cache=False, **options)


def has_own_body(model: PreTrainedModel) -> bool:
    """Whether ``base_model`` is what gives hidden states: not the model itself, nor a wrapper of an encoder-decoder's half."""
    body = model.base_model
    return body is not model and takes(body, "inputs_embeds")


def body_of(model: PreTrainedModel) -> nn.Module:
    """What gives a model's final hidden states, where `has_own_body` says that ``base_model`` does not."""
    inner = model.get_decoder()
    return model.model if inner is model else inner


def takes(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward names this argument."""
    return argument in inspect.signature(module.forward).parameters


def cache_argument(module: nn.Module) -> str | None:
    """What a module's forward calls the cache of keys and values (transformers 5.24 renamed it), or None without one."""
    return next((name for name in ("cache", "past_key_values") if takes(module, name)), None)
