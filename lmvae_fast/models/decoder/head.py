"""A language model's head as the model itself computes it: what stands before and behind the product with its weight.

Most heads are one product. Some scale it (Cohere, Granite), some cap it (Gemma 2), and in BERT's kind a dense layer and a norm
come first. None of them is known by name here: the model's own forward runs around a body that answers with given states, and
what its output embedding reads and makes is compared with what came in and goes out.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

logger = logging.getLogger(__name__)

_SAME = 1e-5  # relative, of float32: another order of the same sums


@dataclass(frozen=True)
class Head:
    """logits = scale * (transform(hidden) @ weight.T + bias), then softcap * tanh(logits / softcap).

    ``transform`` is None where the product reads the final hidden state itself.
    """

    scale: float = 1.0
    softcap: float | None = None
    transform: BeforeProduct | None = None


class _Given(BaseModelOutputWithPastAndCrossAttentions):
    """What a body gives, whatever else of it a model may ask for: None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _Body(nn.Module):
    """Stands where a body stood and answers with its own input."""

    @property
    def decoder(self) -> _Body:  # what wrappers of encoder-decoders are asked for
        return self

    def forward(self, *args: Any, inputs_embeds: Tensor | None = None, **options: Any) -> _Given:
        return _Given(last_hidden_state=inputs_embeds)


class _Product(nn.Module):
    """Stands where the output embedding stood; keeps what it read and, where it computes at all, what it made."""

    def __init__(self, inner: nn.Module | None):
        super().__init__()
        self.inner = [] if inner is None else [inner]  # a list, so that it is no second home of the weight
        self.read: Tensor | None = None
        self.made: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.read = hidden
        self.made = self.inner[0](hidden) if self.inner else hidden
        return self.made


class BeforeProduct:
    """What a model does with a final hidden state before its output embedding reads it: ``[T, hidden]`` to ``[T, width]``.

    Its weights are the model's own; it holds copies of the modules on the way, not of what they contain.
    """

    def __init__(self, model: PreTrainedModel, body: nn.Module, *, product: bool = False):
        head = model.get_output_embeddings()
        self._product = _Product(head if product else None)
        self._around = copy.copy(model)
        _share(self._around, body, _Body())
        _share(self._around, head, self._product)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.parts(hidden)[0]

    def parts(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the output embedding read and made of ``hidden``, and the model's logits."""
        product = self._product
        logits = self._around(inputs_embeds=hidden.unsqueeze(0), use_cache=False, return_dict=True).logits
        assert product.read is not None and product.made is not None
        read, made = product.read.squeeze(0), product.made.squeeze(0)
        product.read = product.made = None  # no graph is kept alive
        return read, made, logits.squeeze(0)


def _share(root: nn.Module, target: nn.Module, replacement: nn.Module) -> None:
    """Put ``replacement`` in the place of ``target`` under ``root``, in copies of the modules that lead to it."""
    name = next(name for name, module in root.named_modules() if module is target)
    path = name.split(".")
    here = root
    for part in path[:-1]:
        here._modules = dict(here._modules)
        below = copy.copy(here._modules[part])
        assert below is not None
        here._modules[part] = below
        here = below
    here._modules = {**here._modules, path[-1]: replacement}


@torch.no_grad()
def find_head(model: PreTrainedModel, body: nn.Module, width: int, device: torch.device) -> Head:
    """The form of a model's head. Where its forward cannot be run so, the plain one, which the examination then judges.

    Args:
        model: in float32. body: what gives the final hidden states, ``[.., width]``.
    """
    softcap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    plain = Head(softcap=softcap)
    hidden = torch.linspace(-1.5, 2, 5 * width, device=device).view(width, 5).t().contiguous().sin()
    try:
        before = BeforeProduct(model, body, product=True)
        read, made, logits = before.parts(hidden)
        before._product.inner.clear()
        again = before(hidden)
    except Exception as error:
        logger.debug("%s's head cannot be run without its body: %s", type(model).__name__, error)
        return plain
    if softcap is not None:
        made_capped = softcap * torch.tanh(made / softcap)
        if _same(logits, made_capped):
            logits = made
    scale = _factor(logits, made)
    if scale is None:
        return plain
    if read.shape == hidden.shape and torch.equal(read, hidden):
        return Head(scale, softcap)
    inner = _factor(read, hidden) if read.shape == hidden.shape else None
    if inner is not None and getattr(model.get_output_embeddings(), "bias", None) is None:
        return Head(scale * inner, softcap)
    if not _same(again, read):
        return plain
    return Head(scale, softcap, BeforeProduct(model, body))


def _factor(got: Tensor, of: Tensor) -> float | None:
    """The number that ``got`` is ``of`` times, or None."""
    if got.shape != of.shape:
        return None
    if torch.equal(got, of):
        return 1.0
    factor = ((got.double() * of.double()).sum() / of.double().square().sum()).item()
    return factor if factor > 0 and _same(got, of * factor) else None


def _same(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and bool((got - want).norm() <= _SAME * want.norm())
