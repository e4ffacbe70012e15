"""Any Hugging Face causal language model as the decoder of a latent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lmvae_fast.errors import ConfigError, NumericalError, UnsupportedDecoderError
from lmvae_fast.kernels.latent_attention.visibility import token_position
from lmvae_fast.models.decoder.attention import AttentionContext, PackedAttention
from lmvae_fast.models.decoder.cache import LatentCache
from lmvae_fast.models.decoder.examination import examine
from lmvae_fast.models.decoder.greedy_token import greedy_tokens, speaking
from lmvae_fast.models.decoder.head import BeforeProduct, Head
from lmvae_fast.models.decoder.obstacles import obstacle, own_embedding
from lmvae_fast.models.decoder.tuning import Tuning
from lmvae_fast.models.decoder.way import Way, body_of, has_own_body
from lmvae_fast.models.injection import Injection
from lmvae_fast.pretrained import load_pretrained
from lmvae_fast.text.tokenizer import SentenceTokenizer

#: What is called before a decoder's weights are moved or cast: whoever keeps something that was made of them lets it go.
WHEN_MOVED: list[Callable[[Decoder], Any]] = []


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
        self._config = model.config.get_text_config(decoder=True)
        self._wrapped = not has_own_body(model)
        self.way = Way()
        self._checked_head: tuple[tuple[int, int], ...] | None = None
        self.position_offset = 0  # of the model's own position ids; the examination finds it
        if not isinstance(getattr(own_embedding(model), "weight", None), Tensor):
            reason, value = obstacle(model, self._config) or ("has no one table of token embeddings", None)
            raise UnsupportedDecoderError(f"{type(model).__name__} {reason}", value=value)
        self.vocab_size, self.hidden_size = self._embedding.shape
        model.requires_grad_(False)
        self.train(False)
        tokenizer.check_ids(self.vocab_size)
        self.head = Head()
        self._examined = (model, self.body)  # in a tuple: they are no further modules
        found = examine(self)
        self.num_layers, self.num_heads = found.layers, found.heads
        self.kv_heads, self.head_dim, self.windows = found.kv_heads, found.head_dim, found.windows
        self.max_positions, self.hidden_window = found.positions, found.hidden_window
        self.position_columns, self.widths = found.position_columns, found.widths
        if train:
            self.tuning.apply(model)
            if self.head.transform is not None:  # adapters may have been put into what it goes through
                self.head = replace(self.head, transform=BeforeProduct(model, self.body))

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: torch.dtype,
        train: bool = False,
        tuning: Tuning | None = None,
        add_prefix_space: bool = True,
        start_token: str | None = None,
    ) -> Decoder:
        """Load from a Hugging Face name or folder; raises CheckpointError when it cannot be had, TokenizerError for a start
        token that it does not know.

        A decoder that trains is held in float32 at least: half precision is then a matter of autocast.
        """
        dtype = torch.promote_types(dtype, torch.float32) if train else dtype
        config = load_pretrained(AutoConfig, name, "decoder")
        model = load_pretrained(AutoModelForCausalLM, name, "decoder", dtype=dtype)
        tokenizer = SentenceTokenizer.load(name, config, add_prefix_space=add_prefix_space, start_token=start_token)
        return cls(model, tokenizer, train=train, tuning=tuning, source=name)

    @property
    def body(self) -> nn.Module:
        """The model without its head."""
        return body_of(self.model) if self._wrapped else self.model.base_model

    @property
    def adapts(self) -> bool:
        """Whether all that trains of it are low-rank adapters."""
        return self.trains and self.tuning.part == "lora"

    @property
    def _embedding(self) -> Tensor:
        return self.model.get_input_embeddings().weight  # type: ignore[return-value]

    @property
    def softcap(self) -> float | None:
        """Cap of the logits, or None."""
        return self.head.softcap

    @property
    def logit_scale(self) -> float:
        """Factor on the product of hidden states and head, before any cap."""
        return self.head.scale

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

    def _apply(self, fn: Any, recurse: bool = True) -> Decoder:
        """As any module's (`to`, `half`, ...); what was prepared from the weights where they were is let go first."""
        for let_go in WHEN_MOVED:
            let_go(self)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Decoder:
        """A frozen decoder stays in evaluation mode: its dropout belongs to its own pre-training. What was prepared for
        decoding from adapters, which are about to change, is let go."""
        if mode and self.adapts and not self.training:
            for let_go in WHEN_MOVED:
                let_go(self)
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
        if self.position_columns:
            attention = partial(attention, position_columns=self.position_columns)
        if injection is None:
            context, position_ids, shift = attention(None, "prefix", cu_seqlens, max_seqlen), token_index, None
        else:
            context = attention(injection.memory, injection.visibility, cu_seqlens, max_seqlen)
            position_ids = token_position(token_index, injection.slots, injection.visibility)
            shift = None if injection.embedding_shift is None else injection.embedding_shift[rows]
        hidden = self.run(input_ids, position_ids, shift, context)
        if injection is not None and injection.output_residual is not None:
            hidden = hidden + injection.output_residual[rows].to(hidden.dtype)
        return hidden

    def step(self, input_ids: Tensor, cache: LatentCache, injection: Injection) -> Tensor:
        """Logits ``[batch, vocabulary]`` of one token per row over the cache, which then is one step further."""
        logits = self.logits(self._step(input_ids, cache, injection))
        cache.finite &= speaking(logits)
        return logits

    def greedy_step(self, input_ids: Tensor, cache: LatentCache, injection: Injection, pack: bool = True) -> Tensor:
        """As `step`, but the token of greatest logit alone, int64 ``[batch]``."""
        return self.greedy_tokens(self._step(input_ids, cache, injection), pack=pack, finite=cache.finite)

    def greedy_tokens(
        self, hidden: Tensor, *, pack: bool = True, at_once: int | None = None, finite: Tensor | None = None
    ) -> Tensor:
        """The token of greatest logit after every hidden state ``[T, hidden]``: int64 ``[T]``.

        pack: whether a bf16 copy of a frozen head may be kept for it. at_once: tokens whose logits may exist at one time.
        finite: truth values ``[T]`` that become false where no logit is a number that can be the greatest.
        """
        return greedy_tokens(
            hidden,
            self.model.get_output_embeddings(),
            self.logits,
            # A factor above 0 moves no maximum.
            only_a_product=(not self.trains or self.adapts) and self.head.softcap is None,
            prepare=pack,
            at_once=at_once,
            finite=finite,
        )

    def _step(self, input_ids: Tensor, cache: LatentCache, injection: Injection) -> Tensor:
        cache.prepare()
        hidden = self.run(input_ids, cache.position_ids(), injection.embedding_shift, cache)
        cache.advance()
        cache.finite &= torch.isfinite(hidden).all(-1)
        if injection.output_residual is not None:
            hidden = hidden + injection.output_residual.to(hidden.dtype)
        return hidden

    def check_head(self) -> None:
        """Raises NumericalError where the head's weight is not finite; looks at it once for as long as it stays as it is."""
        weight, bias = self.head_weight, self.head_bias
        state = tuple((part.data_ptr(), part._version) for part in (weight, bias) if part is not None)
        if state == self._checked_head:
            return
        finite = torch.isfinite(weight.detach()).all(1)
        if bias is not None:
            finite &= torch.isfinite(bias.detach()) | torch.isneginf(bias.detach())  # a token that is never said
        if not bool(finite.all()):
            tokens = (~finite).nonzero().squeeze(1).tolist()
            raise NumericalError(
                "the decoder's head holds NaN or Inf, so that no token is the most probable one",
                value=f"weights of token {tokens[0]}" + (f" and {len(tokens) - 1} more" if len(tokens) > 1 else ""),
                remedy="load the decoder again; a training run's last good checkpoint is in its folder",
            )
        self._checked_head = state

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: ``[..., vocabulary]``."""
        logits, head = self.model.get_output_embeddings()(hidden), self.head
        if head.scale != 1.0:
            logits = logits * head.scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        return logits

    def new_cache(self, injection: Injection, *, batch: int, max_tokens: int) -> LatentCache:
        """An empty static cache for injections of this kind."""
        self.check_positions(injection.slots, max_tokens, injection.visibility)
        return LatentCache(
            layers=self.num_layers,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            batch=batch,
            slots=injection.slots,
            max_tokens=max_tokens,
            visibility=injection.visibility,
            dtype=self.dtype,
            device=self.device,
            position_columns=self.position_columns,
        )

    def most_tokens(self, slots: int) -> int | None:
        """The most tokens that may stand behind a prefix of so many slots; None without a limit."""
        limits = [limit - slots for limit in (self.max_positions, self.hidden_window) if limit is not None]
        return min(limits, default=None)

    def check_positions(self, slots: int, tokens: int, visibility: str) -> None:
        """Raises ConfigError where tokens would stand past the decoder's positions, or past a window we cannot honour."""
        last = token_position(max(tokens, 1) - 1, slots, visibility)
        if self.max_positions is not None and last >= self.max_positions:
            raise ConfigError(
                f"{tokens} tokens under {visibility} visibility with {slots} slots reach position {last}",
                value=last,
                limit=f"the decoder's {self.max_positions} positions",
                remedy="lower max_len, max_prompt_len or slots",
            )
        if self.hidden_window is not None and slots + tokens > self.hidden_window:
            raise UnsupportedDecoderError(
                "the decoder's sliding window acts through a mask that our attention does not see",
                value=f"{slots} slots and {tokens} tokens",
                limit=f"a window of {self.hidden_window}",
                remedy="lower max_len or slots",
            )
        window = min((window for window in self.windows.values() if window is not None), default=None)
        if visibility == "rolling" and window is not None and window < tokens + 1:
            raise UnsupportedDecoderError(
                "rolling visibility does not reach past a sliding window",
                value=f"{tokens + 1} visible entries",
                limit=f"a window of {window}",
                remedy="lower max_len",
            )

    def run(self, input_ids: Tensor, position_ids: Tensor, shift: Tensor | None, context: AttentionContext) -> Tensor:
        """Hidden states ``[T, hidden]`` of packed tokens at given positions, their embeddings moved by ``shift``."""
        way, body = self.way, self.body
        if (self.model, body) != self._examined:
            raise UnsupportedDecoderError(
                "the decoder's model has been replaced by one that was not examined: its memory would be ignored",
                value=type(self.model).__name__,
                remedy="build a Decoder of it, Decoder(model, tokenizer), or copy its weights into the model that is there",
            )
        if self._config._attn_implementation != way.attention:
            raise UnsupportedDecoderError(
                "the decoder's attention has been taken away from lmvae_fast: its memory would be ignored",
                value=self._config._attn_implementation,
                limit=way.attention,
                remedy=f"decoder.model.set_attn_implementation({way.attention!r})",
            )
        if self.position_offset:
            position_ids = position_ids + self.position_offset
        embedded = self.model.get_input_embeddings()(input_ids)
        if shift is not None:
            embedded = embedded + shift.to(embedded.dtype)
        embedded = embedded.unsqueeze(0)
        if way.plain:
            out = body(inputs_embeds=embedded, position_ids=position_ids.unsqueeze(0), use_cache=False, lmvae=context)
        else:
            out = way.call(body, embedded, position_ids, context)
        hidden = out.last_hidden_state.squeeze(0)
        return hidden if self.head.transform is None else self.head.transform(hidden)
