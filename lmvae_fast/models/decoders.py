"""Any Hugging Face causal language model as the decoder of a latent."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lmvae_fast.errors import ConfigError, UnsupportedDecoderError
from lmvae_fast.kernels.latent_attention.visibility import token_position
from lmvae_fast.models.activations import fuse_activations
from lmvae_fast.models.attention import (
    ATTENTION,
    AttentionContext,
    PackedAttention,
    RecordingAttention,
    without_attention_dropout,
)
from lmvae_fast.models.cache import LatentCache
from lmvae_fast.models.head import greedy_tokens
from lmvae_fast.models.injection import Injection
from lmvae_fast.models.loading import load_pretrained
from lmvae_fast.models.tokenization import SentenceTokenizer
from lmvae_fast.models.tuning import Tuning

logger = logging.getLogger(__name__)

_EXAMINED = (5, 3)  # tokens of the two sentences that every decoder is examined with
_LAYER_KINDS = ("full_attention", "sliding_attention")
_DECODERS = "use a decoder with key-value attention in every layer (GPT-2, Llama, Qwen, Mistral, Gemma, ...)"


class Decoder(nn.Module):
    """A causal language model whose attention also sees a memory.

    The model is examined once: every layer must go through our attention with one head geometry, and without a memory
    the result must equal the model's own. A decoder that fails is refused, never computed wrong.

    Args:
        model: the causal LM. Its attention implementation is switched to ours.
        tokenizer: its tokenizer.
        train: whether it trains; it is frozen otherwise.
        tuning: what of it trains then.
        source: name or folder it came from, if any.

    Raises:
        UnsupportedDecoderError: no keys and values to add to (state-space models), or a layer kind we do not honour.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: SentenceTokenizer,
        *,
        train: bool = False,
        tuning: Tuning | None = None,
        source: str | None = None,
    ):
        super().__init__()
        self.model, self.tokenizer, self.trains, self.source = model, tokenizer, train, source
        self.tuning = tuning or Tuning()
        config = model.config.get_text_config(decoder=True)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self.vocab_size, self.hidden_size = self._embedding.shape
        model.requires_grad_(False)
        self.train(False)
        tokenizer.check_ids(self.vocab_size)
        self._examine()
        if train:
            self.tuning.apply(model)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: torch.dtype,
        train: bool = False,
        tuning: Tuning | None = None,
        add_prefix_space: bool = True,
    ) -> Decoder:
        """Load from a Hugging Face name or folder; raises CheckpointError when it cannot be had.

        A decoder that trains is held in float32 at least: half precision is then a matter of autocast.
        """
        dtype = torch.promote_types(dtype, torch.float32) if train else dtype
        config = load_pretrained(AutoConfig, name, "decoder")
        model = load_pretrained(AutoModelForCausalLM, name, "decoder", dtype=dtype)
        tokenizer = SentenceTokenizer.load(name, config, add_prefix_space=add_prefix_space)
        return cls(model, tokenizer, train=train, tuning=tuning, source=name)

    @property
    def body(self) -> nn.Module:
        """The model without its head."""
        return self.model.base_model

    @property
    def _embedding(self) -> Tensor:
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def head_weight(self) -> Tensor:
        """Weight of the head, ``[vocabulary, hidden]``."""
        return self.model.get_output_embeddings().weight

    @property
    def head_bias(self) -> Tensor | None:
        """Bias of the head, ``[vocabulary]``, or None."""
        return getattr(self.model.get_output_embeddings(), "bias", None)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self._embedding.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._embedding.device

    def train(self, mode: bool = True) -> Decoder:
        """A frozen decoder stays in evaluation mode: its dropout belongs to its own pre-training."""
        super().train(mode and self.trains)
        return self

    def hidden(
        self,
        input_ids: Tensor,
        injection: Injection | None,
        *,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rows: Tensor,
        token_index: Tensor,
        attention: Callable[..., PackedAttention] = PackedAttention,
    ) -> Tensor:
        """Final hidden states ``[T, hidden]`` of a packed batch in one parallel pass (fields as in Batch).

        attention: what makes the pass's attention of memory, visibility, cu_seqlens and max_seqlen.
        """
        if injection is None:
            context, position_ids, shift = attention(None, "prefix", cu_seqlens, max_seqlen), token_index, None
        else:
            context = attention(injection.memory, injection.visibility, cu_seqlens, max_seqlen)
            position_ids = token_position(token_index, injection.slots, injection.visibility)
            shift = None if injection.embedding_shift is None else injection.embedding_shift[rows]
        hidden = self._run(input_ids, position_ids, shift, context)
        if injection is not None and injection.output_residual is not None:
            hidden = hidden + injection.output_residual[rows].to(hidden.dtype)
        return hidden

    def step(self, input_ids: Tensor, cache: LatentCache, injection: Injection) -> Tensor:
        """Logits ``[batch, vocabulary]`` of one token per row over the cache, which then is one step further."""
        return self.logits(self._step(input_ids, cache, injection))

    def greedy_step(self, input_ids: Tensor, cache: LatentCache, injection: Injection, pack: bool = True) -> Tensor:
        """As `step`, but the token of greatest logit alone, int64 ``[batch]``."""
        return greedy_tokens(self, self._step(input_ids, cache, injection), pack=pack)

    def _step(self, input_ids: Tensor, cache: LatentCache, injection: Injection) -> Tensor:
        cache.prepare()
        hidden = self._run(input_ids, cache.position_ids(), injection.embedding_shift, cache)
        cache.advance()
        if injection.output_residual is not None:
            hidden = hidden + injection.output_residual.to(hidden.dtype)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: ``[..., vocabulary]``."""
        logits = self.model.get_output_embeddings()(hidden)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def new_cache(self, injection: Injection, *, batch: int, max_tokens: int) -> LatentCache:
        """An empty static cache for injections of this kind."""
        self.check_positions(injection.slots, max_tokens, injection.visibility)
        return LatentCache(
            layers=self.num_layers, kv_heads=self.kv_heads, head_dim=self.head_dim, batch=batch, slots=injection.slots,
            max_tokens=max_tokens, visibility=injection.visibility, dtype=self.dtype, device=self.device,
        )  # fmt: skip

    def check_positions(self, slots: int, tokens: int, visibility: str) -> None:
        """Raises ConfigError where tokens would stand past the decoder's positions, or past a window we cannot honour."""
        last = token_position(max(tokens, 1) - 1, slots, visibility)
        if self.max_positions is not None and last >= self.max_positions:
            raise ConfigError(
                f"{tokens} tokens under {visibility} visibility with {slots} slots reach position {last}",
                value=last, limit=f"the decoder's {self.max_positions} positions", remedy="lower max_len",
            )  # fmt: skip
        window = min((window for window in self.windows.values() if window is not None), default=None)
        if visibility == "rolling" and window is not None and window < tokens + 1:
            raise UnsupportedDecoderError(
                "rolling visibility does not reach past a sliding window",
                value=f"{tokens + 1} visible entries", limit=f"a window of {window}", remedy="lower max_len",
            )  # fmt: skip

    def _run(
        self, input_ids: Tensor, position_ids: Tensor, shift: Tensor | None, context: AttentionContext
    ) -> Tensor:
        embedded = self.model.get_input_embeddings()(input_ids)
        if shift is not None:
            embedded = embedded + shift.to(embedded.dtype)
        out = self.body(
            inputs_embeds=embedded.unsqueeze(0), position_ids=position_ids.unsqueeze(0), use_cache=False, lmvae=context
        )
        return out.last_hidden_state.squeeze(0)

    def _examine(self) -> None:
        """Learn the head geometry, and prove on eight packed tokens that our path computes this model's own logits."""
        name = type(self.model).__name__
        try:
            expected, plain = self._eager_logits()
            fuse_activations(self.model)  # here, so that the comparison below covers it
            seen, got = self._packed_logits()
        except UnsupportedDecoderError as error:
            if "handed over" in error.problem:
                raise UnsupportedDecoderError(
                    f"{name} does not pass keyword arguments down to its attention", remedy=_DECODERS
                ) from error
            raise
        except (ValueError, AttributeError, TypeError, RuntimeError, KeyError, IndexError) as error:
            raise UnsupportedDecoderError(
                f"{name} cannot be run through our attention: {error}", remedy=_DECODERS
            ) from error
        self._check_layers(name, seen)
        self.num_layers = len(seen.shapes)
        self.num_heads, self.kv_heads, self.head_dim = seen.shapes[0]
        self.windows = seen.windows
        # Another order of the same sums: some units in the last place per layer. Eager attention works in float32 at best.
        eps = max(torch.finfo(self.dtype).eps, torch.finfo(torch.float32).eps)
        tolerance = min(16 * eps * self.num_layers**0.5, 0.1)
        last = slice(_EXAMINED[0], None)
        if not _relative(expected[last], plain) > 0:
            raise UnsupportedDecoderError(
                f"{name} takes no notice of position ids, so a memory cannot stand before its tokens", remedy=_DECODERS
            )
        difference = _relative(got, expected)
        if not difference <= tolerance:
            raise UnsupportedDecoderError(
                f"{name} computes something that our attention or head leaves out",
                value=f"logits off by {difference:.2e} of their norm", limit=f"{tolerance:.1e}",
                remedy="report the model; scaled logits, attention sinks and biased scores are not honoured yet",
            )  # fmt: skip
        dropped = max(without_attention_dropout(module) for module in seen.modules.values())
        if self.trains and dropped:
            logger.warning("%s: dropout %.2g on attention weights is switched off (our attention has none)", name, dropped)

    @torch.no_grad()
    def _eager_logits(self) -> tuple[Tensor, Tensor]:
        """The model's own logits of both examined sentences ``[8, vocabulary]``, and of the second at positions 0, 1, 2."""
        self.model.set_attn_implementation("eager")
        first, second = self._examined_ids().split(_EXAMINED)

        def logits(ids: Tensor, positions: Tensor) -> Tensor:
            out = self.model(
                input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), position_ids=positions[None],
                use_cache=False,
            )  # fmt: skip
            return out.logits[0].float()

        places = torch.arange(len(first), device=self.device)
        plain = logits(second, places[: len(second)])
        return torch.cat([logits(first, places), logits(second, 2 * places[: len(second)] + 1)]), plain

    @torch.no_grad()
    def _packed_logits(self) -> tuple[RecordingAttention, Tensor]:
        """The same two sentences packed through our attention: what its layers asked for, and the logits."""
        self.model.set_attn_implementation(ATTENTION)
        lengths = torch.tensor([0, *_EXAMINED], device=self.device)
        seen = RecordingAttention(None, "prefix", lengths.cumsum(0).to(torch.int32), max(_EXAMINED))
        # The second sentence stands at positions 1, 3, 5, as tokens between slots do.
        positions = torch.cat([torch.arange(n, device=self.device) for n in _EXAMINED])
        positions[_EXAMINED[0] :] = 2 * positions[_EXAMINED[0] :] + 1
        hidden = self._run(self._examined_ids(), positions, None, seen)
        return seen, self.logits(hidden).float()

    def _examined_ids(self) -> Tensor:
        return torch.arange(1, sum(_EXAMINED) + 1, device=self.device) * 7 % self.vocab_size

    def _check_layers(self, name: str, seen: RecordingAttention) -> None:
        """Raises UnsupportedDecoderError unless every layer came through our attention, alike, and with its window."""
        config = self.model.config.get_text_config(decoder=True)
        layers = getattr(config, "num_hidden_layers", None)
        if not seen.shapes or sorted(seen.shapes) != list(range(layers or len(seen.shapes))):
            raise UnsupportedDecoderError(
                f"{name} has layers without keys and values, which a memory cannot reach",
                value=f"{len(seen.shapes)} attention layers of {layers}", remedy="use a decoder with attention everywhere",
            )  # fmt: skip
        if len(set(seen.shapes.values())) != 1:
            raise UnsupportedDecoderError(
                f"{name} has layers of different head geometry", value=sorted(set(seen.shapes.values())),
                limit="one (heads, kv_heads, head_dim) in all layers",
            )  # fmt: skip
        # A window that acts through Hugging Face's mask alone would be lost on us, and eight tokens would not show it.
        for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
            if kind not in _LAYER_KINDS or (kind == "sliding_attention" and seen.windows.get(layer) is None):
                raise UnsupportedDecoderError(
                    f"{name}: layer {layer} is of a kind we do not honour", value=kind, limit=", ".join(_LAYER_KINDS),
                    remedy=_DECODERS,
                )  # fmt: skip


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()
